"""Which GPUs a build has code for: architectures of torch's and of vLLM's kernels against a compute capability.

vLLM names its architectures nowhere in Python, so they are read from the "fat binaries" that nvcc puts into its
extension modules. Layout of those as the driver reads it: a header (magic, version, its own size, size of what
follows), then entries (kind: 1 PTX, 2 machine code; size of the entry's header; size of its content; architecture).
"""

from __future__ import annotations

import importlib.util
import mmap
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

MAGIC = struct.pack("<I", 0xBA55ED50)
_HEADER = struct.Struct("<IHHQ")  # magic, version, size of this header, size of the entries
_ENTRY = struct.Struct(
    "<HHIQIIII"
)  # kind, version, size of this header, size of the content, ..., ..., ..., architecture
_KINDS = {1: "compute", 2: "sm"}
EMBEDDED = {(5, 3), (6, 2), (7, 2), (8, 7), (10, 1)}  # Jetson and Drive: machine code is theirs alone
EXTENSIONS = "_C*.so"  # vLLM's general kernels; others serve single models or quantizations


def covers(architectures: Iterable[str], capability: tuple[int, int]) -> bool:
    """Whether code for such architectures ("sm_90", "sm_90a", "compute_80") runs on a GPU of this capability.

    Machine code runs on GPUs of the same major version from its minor version on; "a" on that very one alone; PTX is
    compiled by the driver for any later one.
    """
    for architecture in architectures:
        kind, _, number = architecture.partition("_")
        digits = number.rstrip("af")
        if not digits.isdigit():
            continue
        built = int(digits) // 10, int(digits) % 10
        if number.endswith("a") or (kind == "sm" and not EMBEDDED.isdisjoint({built, capability})):
            runs = built == capability
        elif kind == "sm":
            runs = built[0] == capability[0] and built[1] <= capability[1]
        else:
            runs = built <= capability
        if runs:
            return True
    return False


def vllm_extensions() -> list[Path]:
    """Of the installed vLLM, found without importing it."""
    spec = importlib.util.find_spec("vllm")
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    return [path for folder in folders for path in sorted(Path(folder).glob(EXTENSIONS))]


def architectures(path: Path) -> set[str]:
    """Of the device code in a shared library; empty where it holds none."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return set(_architectures(data))


def _architectures(data: mmap.mmap) -> Iterator[str]:
    at = 0
    while (at := data.find(MAGIC, at)) >= 0:
        if at + _HEADER.size > len(data):
            return
        _, version, header, size = _HEADER.unpack_from(data, at)
        entry, end = at + header, min(at + header + size, len(data))
        if version != 1 or header != _HEADER.size:  # these bytes by chance
            at += len(MAGIC)
            continue
        while entry + _ENTRY.size <= end:
            kind, _, own, content, _, _, _, architecture = _ENTRY.unpack_from(data, entry)
            if own == 0:
                break
            if kind in _KINDS:
                yield f"{_KINDS[kind]}_{architecture}"
            entry += own + content
        at = max(end, at + len(MAGIC))


def told(names: Iterable[str]) -> str:
    """``7.5, 8.0, PTX 9.0``: for people."""
    by_kind: dict[str, set[tuple[int, int, str]]] = {"sm": set(), "compute": set()}
    for name in names:
        kind, _, number = name.partition("_")
        digits = number.rstrip("af")
        if kind in by_kind and digits.isdigit():
            by_kind[kind].add((int(digits) // 10, int(digits) % 10, number[len(digits) :]))
    code = [f"{major}.{minor}{suffix}" for major, minor, suffix in sorted(by_kind["sm"])]
    ptx = [f"PTX {major}.{minor}" for major, minor, _ in sorted(by_kind["compute"])]
    return ", ".join([*code, *ptx]) or "none"
