"""Errors of CUDA, NCCL, torch and vLLM, and the key or command that helps against each.

The first text of `KNOWN` that occurs in a library's message selects the advice. tests/unit/utils/test_gpu_errors.py
looks up each text in the source or library that it is quoted from.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Role = Literal["learner", "sampler"]
Advice = str | Callable[[str], str]  # a function if the advice quotes a number of the message


@dataclass(frozen=True, slots=True)
class Known:
    text: str  # as the library writes it
    source: str  # where: a module's path below site-packages, or the stem of a shared library
    sampler: Advice
    learner: Advice | None = None  # None: the sampler's advice


def advice(said: str, role: Role) -> str | None:
    """What to change; None for an unknown error."""
    known = next((entry for entry in KNOWN if entry.text in said), None)
    if known is None:
        return None
    chosen = known.learner if role == "learner" and known.learner is not None else known.sampler
    return chosen if isinstance(chosen, str) else chosen(said)


def advised(error: str, said: str, role: Role) -> str:
    """The error in one line with its advice. `said`: the error and the output around it."""
    help_ = advice(said, role)
    return error if help_ is None else f"{error} -> {help_}"


def _shorter(said: str) -> str:
    """Advice with the largest model.max_length that fits: vLLM gets one position more."""
    longest = re.search(r"estimated maximum model length is (\d+)", said)
    fits = f"set model.max_length={int(longest[1]) - 1} or less, or " if longest and int(longest[1]) > 8 else ""
    return f"{fits}raise sampler.gpu_memory_utilization, or lower sampler.max_num_seqs; `rlsys plan` has the sizes"


def _free_share(said: str) -> str:
    found = re.search(r"\(([\d.]+)/([\d.]+) GiB\)", said)
    share = int(100 * float(found[1]) / float(found[2])) / 100 if found else 0.0
    lower = f"set sampler.gpu_memory_utilization={share:g} or less" if share > 0 else "use another GPU"
    return f"other processes use the GPU (`nvidia-smi` lists them): end them, or {lower}"


def _driver(said: str) -> str:
    found = re.search(r"found version (\d+)", said)
    served = f", which serves CUDA {int(found[1]) // 1000}.{int(found[1]) % 1000 // 10} at most" if found else ""
    return f"update the NVIDIA driver{served}; `rlsys doctor` compares it with what torch was built for"


_LESS_SAMPLER = "lower sampler.max_num_seqs, sampler.max_num_batched_tokens or sampler.gpu_memory_utilization"
_LESS_LEARNER = (
    "lower learner.token_budget or learner.logprob_chunk_tokens, or set learner.gradient_checkpointing=true; on a "
    "shared GPU lower sampler.gpu_memory_utilization or raise learner.num_gpus"
)
_BUILD = "no code for this GPU in the installed build: `rlsys doctor` lists those that torch and vLLM were built for"
_HARDWARE = (
    "a fault of the GPU, its driver or a kernel: `dmesg | grep -i xid` names it; run again, on another GPU if it stays"
)
_NCCL = "NCCL_DEBUG=INFO in the environment has NCCL say more"

KNOWN = (
    # of vLLM, which names its own arguments
    Known(
        "No available memory for the cache blocks",
        "vllm/v1/core/kv_cache_utils.py",
        "weights, LoRA slots and CUDA graphs leave nothing for the KV cache: raise sampler.gpu_memory_utilization, or "
        "lower sampler.max_num_batched_tokens or sampler.max_live_adapters; `rlsys plan` has the sizes",
    ),
    Known("To serve at least one request with the model's max seq len", "vllm/v1/core/kv_cache_utils.py", _shorter),
    Known("is less than desired GPU memory utilization", "vllm/v1/worker/utils.py", _free_share),
    Known("Bfloat16 is only supported on GPUs", "vllm/platforms/cuda.py", "set model.dtype=float16"),
    Known(
        "assert inputs.dtype in [torch.float16, torch.bfloat16]",
        "vllm/lora/ops/triton_ops/lora_shrink_op.py",
        "vLLM's LoRA kernels take half precision alone: set model.dtype=bfloat16 or float16",
    ),
    Known(
        "Cannot re-initialize CUDA in forked subprocess",
        "torch/cuda/__init__.py",
        "set VLLM_WORKER_MULTIPROC_METHOD=spawn in the environment, and start CUDA in no module that a job imports",
    ),
    Known(
        "Failed to find C compiler",
        "triton/runtime/build.py",
        "Triton compiles a launcher for each kernel: install gcc, or name a compiler in CC",
    ),
    # of NCCL, before CUDA's, which its messages may quote
    Known(
        "Duplicate GPU detected",
        "libnccl",
        "two ranks on one GPU: set learner.num_gpus=1, and sampler.num_gpus to sampler.tensor_parallel_size",
    ),
    Known(
        " shared memory segment ",
        "libnccl",
        "/dev/shm is too small for NCCL: in a container --shm-size=8g; `rlsys doctor` tells its size",
    ),
    Known(
        "no socket interface found",
        "libnccl",
        "set NCCL_SOCKET_IFNAME to the interface between the nodes, such as eth0 (`ip -brief address`)",
    ),
    Known("ncclRemoteError", "libtorch_cuda", f"another rank has ended: its own error is the cause; else {_NCCL}"),
    Known(
        "ncclSystemError",
        "libtorch_cuda",
        f"NCCL met an error of network or shared memory: NCCL_SOCKET_IFNAME, --shm-size; {_NCCL}",
    ),
    Known("ncclUnhandledCudaError", "libtorch_cuda", f"do driver and CUDA fit (`rlsys doctor`)? {_NCCL}"),
    Known("NCCL error in", "libtorch_cuda", _NCCL),
    # of CUDA and torch
    Known("The NVIDIA driver on your system is too old", "libc10_cuda", _driver),
    Known("CUDA driver version is insufficient for CUDA runtime version", "libcudart", _driver),
    Known("the provided PTX was compiled with an unsupported toolchain", "libcudart", _driver),
    Known("no kernel image is available for execution on the device", "libcudart", _BUILD),
    Known(
        "Found no NVIDIA driver on your system",
        "libc10_cuda",
        "install the NVIDIA driver, start the container with --gpus all, or set learner.num_gpus=0",
    ),
    Known(
        "No CUDA GPUs are available",
        "libc10_cuda",
        "what does CUDA_VISIBLE_DEVICES hide? `rlsys doctor` tells which GPUs are visible",
    ),
    Known(
        "CUDA-capable device(s) is/are busy or unavailable",
        "libcudart",
        "another process has the GPU to itself: end it, or `nvidia-smi -c 0` (compute mode default)",
    ),
    Known("uncorrectable ECC error", "libcudart", _HARDWARE),
    Known("an illegal memory access was encountered", "libcudart", _HARDWARE),
    Known("device-side assert triggered", "libcudart", _HARDWARE),
    Known("out of memory", "libcudart", _LESS_SAMPLER, _LESS_LEARNER),
    Known("CUBLAS_STATUS_ALLOC_FAILED", "libtorch_cuda", _LESS_SAMPLER, _LESS_LEARNER),
)
