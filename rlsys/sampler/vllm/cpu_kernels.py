"""Registers vLLM's kernels for a CPU when it is imported: once, in the process from which engines are forked.

Each worker of vLLM registers them when it starts, and looks through the attributes of all imported modules for copies
of what they replace. That takes longer than loading a small model. Modules that are imported later take what is
registered.
"""

from __future__ import annotations

from vllm.platforms.cpu import CpuPlatform

CpuPlatform.register_triton_kernel_overrides()
CpuPlatform.register_triton_kernel_overrides = classmethod(lambda cls: None)
