"""The precision in which a learner computes with a base of ``model.dtype``.

torch multiplies bfloat16 matrices on a CPU through oneDNN where the processor has AVX-512 or AVX-NE-CONVERT, or Arm's
bf16 extension. Elsewhere it falls back to loops that are tens to hundreds of times slower than float32
(``python -m benchmarks.precision``). There the learner keeps the values of the base, rounded to bfloat16, and computes
with them in float32. float16 needs AVX-512 FP16 or AVX-NE-CONVERT: without, one product of 1,024 x 1,024 took 6.6 s on
one core, 0.06 s in float32. Told from the processor's flags, not by a stopwatch: the same machine gives the same bits.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

BFLOAT16_CAPABILITY = (8, 0)  # as vllm.platforms.cuda has it
CPUINFO = Path("/proc/cpuinfo")
_AVX512 = frozenset({"avx512bw", "avx512dq", "avx512vl"})


def computing_dtype(dtype: str, device: str) -> str:
    """Of a base in `dtype` on `device` ("cpu" or "cuda"): `dtype` itself, or "float32"."""
    if device != "cpu":
        return dtype
    fast = {"bfloat16": multiplies_bfloat16, "float16": multiplies_float16}.get(dtype)
    return dtype if fast is None or fast() else "float32"


def bfloat16_problem(dtype: str, capability: tuple[int, int], who: str) -> str | None:
    """Why a GPU does not compute in `dtype`: below compute capability 8.0 vLLM refuses bfloat16, and torch imitates it
    slowly. None where it does."""
    if dtype != "bfloat16" or capability >= BFLOAT16_CAPABILITY:
        return None
    major, minor = capability
    return (
        f"{who} has compute capability {major}.{minor}, and bfloat16 needs {BFLOAT16_CAPABILITY[0]}.0 or later; set "
        "model.dtype=float16"
    )


@cache
def multiplies_bfloat16() -> bool:
    """Whether this machine's CPU has what torch's bfloat16 kernels need."""
    return of_cpuinfo(_cpuinfo(), platform.machine())


@cache
def multiplies_float16() -> bool:
    """The same of float16; on Arm it was never tried, and is not expected."""
    return not {"avx512_fp16", "avx_ne_convert"}.isdisjoint(_flags(_cpuinfo(), platform.machine()))


def of_cpuinfo(text: str, machine: str) -> bool:
    """Whether a CPU with this text of /proc/cpuinfo multiplies bfloat16."""
    flags = _flags(text, machine)
    return flags >= _AVX512 or "avx_ne_convert" in flags or (machine == "aarch64" and "bf16" in flags)


def _cpuinfo() -> str:
    return CPUINFO.read_text("utf-8") if CPUINFO.is_file() else ""


def _flags(text: str, machine: str) -> frozenset[str]:
    name = {"x86_64": "flags", "aarch64": "Features"}.get(machine)
    lines = (line.partition(":") for line in text.splitlines())
    return next((frozenset(value.split()) for key, _, value in lines if key.strip() == name), frozenset())
