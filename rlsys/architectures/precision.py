"""Selects the precision in which the learner computes with a base model of ``model.dtype``.

On a CPU with AVX-512, AVX-NE-CONVERT or Arm's bf16 extension, torch multiplies bfloat16 matrices with oneDNN. On other
CPUs it falls back to loops that are tens to hundreds of times slower than float32 (``python -m benchmarks.precision``).
The learner then keeps the base model's values, rounded to bfloat16, and computes with them in float32. float16 needs
AVX-512 FP16 or AVX-NE-CONVERT: without them, a product of two 1,024 x 1,024 matrices took 6.6 s on one core, and 0.06 s
in float32. The choice depends on the processor's flags, not on timings, so the same machine computes the same bits.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

BFLOAT16_CAPABILITY = (8, 0)  # minimum compute capability, as in vllm.platforms.cuda
CPUINFO = Path("/proc/cpuinfo")
_AVX512 = frozenset({"avx512bw", "avx512dq", "avx512vl"})


def computing_dtype(dtype: str, device: str) -> str:
    """Return the dtype of computations with a base model in `dtype` on `device` ("cpu" or "cuda").

    `dtype` itself, or "float32" if the CPU has no fast kernels for it.
    """
    if device != "cpu":
        return dtype
    fast = {"bfloat16": multiplies_bfloat16, "float16": multiplies_float16}.get(dtype)
    return dtype if fast is None or fast() else "float32"


def rounding_note(cpu: str, dtype: str, computing: str) -> str:
    """Return what to tell the user where `computing` is not the model's `dtype`; `cpu` names the CPU."""
    return f"{cpu} has no kernels for {dtype}: {computing} is computed with {dtype}'s weights"


def bfloat16_problem(dtype: str, capability: tuple[int, int], who: str) -> str | None:
    """Return why a GPU cannot compute in `dtype`, None if it can; `who` names the GPU.

    Below compute capability 8.0, vLLM refuses bfloat16, and torch emulates it slowly.
    """
    if dtype != "bfloat16" or capability >= BFLOAT16_CAPABILITY:
        return None
    major, minor = capability
    return (
        f"{who} has compute capability {major}.{minor}, but bfloat16 needs {BFLOAT16_CAPABILITY[0]}.0 or later; set "
        "model.dtype=float16"
    )


@cache
def multiplies_bfloat16() -> bool:
    """Return whether this machine's CPU supports torch's fast bfloat16 kernels."""
    return of_cpuinfo(_cpuinfo(), platform.machine())


@cache
def multiplies_float16() -> bool:
    """Return whether this machine's CPU supports fast float16 kernels; Arm is untested and counts as False."""
    return not {"avx512_fp16", "avx_ne_convert"}.isdisjoint(_flags(_cpuinfo(), platform.machine()))


def of_cpuinfo(text: str, machine: str) -> bool:
    """Return whether a CPU with this text of /proc/cpuinfo supports fast bfloat16 kernels."""
    flags = _flags(text, machine)
    return flags >= _AVX512 or "avx_ne_convert" in flags or (machine == "aarch64" and "bf16" in flags)


def _cpuinfo() -> str:
    return CPUINFO.read_text("utf-8") if CPUINFO.is_file() else ""


def _flags(text: str, machine: str) -> frozenset[str]:
    name = {"x86_64": "flags", "aarch64": "Features"}.get(machine)
    lines = (line.partition(":") for line in text.splitlines())
    return next((frozenset(value.split()) for key, _, value in lines if key.strip() == name), frozenset())
