"""Errors of CUDA, NCCL and vLLM come with what to change; their texts are those of the libraries."""

from __future__ import annotations

import importlib.util
import mmap
from pathlib import Path

import pytest
import torch
from pydantic import BaseModel, ValidationError, field_validator

from rlsys.distributed.ranks import is_out_of_memory
from rlsys.sampler.postmortem import refusal
from rlsys.utils.gpu_errors import KNOWN, Known, Role, advice, advised
from tests.unit.sampler.test_postmortem import cause

SITE = Path(str(torch.__file__)).parents[1]
OF_PYTHON = [known for known in KNOWN if known.source.endswith(".py")]
COMPILED = [known for known in KNOWN if not known.source.endswith(".py")]


@pytest.mark.parametrize("known", OF_PYTHON, ids=lambda known: known.text[:40])
def test_the_text_stands_in_the_library_s_source(known: Known) -> None:
    package = known.source.partition("/")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed, which the CUDA build of torch brings")
    source = (SITE / known.source).read_text("utf-8")
    assert known.text in source or known.text in joined(source), known


def joined(source: str) -> str:
    """With string literals over several lines as one."""
    lines = [line.strip() for line in source.splitlines()]
    return "".join(line.removeprefix("f").strip('"') for line in lines)


@pytest.mark.parametrize("known", COMPILED, ids=lambda known: known.text[:40])
def test_the_text_stands_in_the_shared_library(known: Known) -> None:
    if torch.version.cuda is None:
        pytest.skip("torch is a CPU build here, which has no CUDA libraries")
    libraries = [*SITE.glob(f"torch/lib/{known.source}.so"), *SITE.glob(f"nvidia/*/lib/{known.source}.so*")]
    assert libraries, known.source
    assert any(contains(path, known.text) for path in libraries), known


def contains(path: Path, text: str) -> bool:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return data.find(text.encode()) >= 0


SAID: list[tuple[str, Role, str]] = [
    (
        "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when ...",
        "sampler",
        "raise sampler.gpu_memory_utilization",
    ),
    (
        "ValueError: To serve at least one request with the model's max seq len (8193), (0.88 GiB KV cache is needed, "
        "which is larger than the available KV cache memory (0.44 GiB). Based on the available memory, the estimated "
        "maximum model length is 4097. Try increasing `gpu_memory_utilization`",
        "sampler",
        "set model.max_length=4096 or less, or raise sampler.gpu_memory_utilization",
    ),
    (
        "ValueError: Free memory on device cuda:0 (20.5/44.4 GiB) on startup is less than desired GPU memory "
        "utilization (0.6, 26.6 GiB).",
        "sampler",
        "set sampler.gpu_memory_utilization=0.46 or less",
    ),
    ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", "sampler", "sampler.max_num_seqs"),
    ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", "learner", "learner.token_budget"),
    ("RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling", "learner", "learner.token_budget"),
    (
        "torch.AcceleratorError: CUDA error: no kernel image is available for execution on the device",
        "sampler",
        "`rlsys doctor` lists those",
    ),
    (
        "RuntimeError: The NVIDIA driver on your system is too old (found version 12080). Please update",
        "learner",
        "update the NVIDIA driver, which serves CUDA 12.8 at most",
    ),
    (
        "torch.AcceleratorError: CUDA error: CUDA driver version is insufficient for CUDA runtime version",
        "sampler",
        "update the NVIDIA driver; `rlsys doctor`",
    ),
    (
        "RuntimeError: Cannot re-initialize CUDA in forked subprocess. To use CUDA with multiprocessing",
        "sampler",
        "VLLM_WORKER_MULTIPROC_METHOD=spawn",
    ),
    (
        "ValueError: Bfloat16 is only supported on GPUs with compute capability of at least 8.0. Your Tesla T4",
        "sampler",
        "set model.dtype=float16",
    ),
]


@pytest.mark.parametrize(("said", "role", "wanted"), SAID, ids=[f"{role}: {said[:50]}" for said, role, _ in SAID])
def test_the_advice_names_the_key_and_a_value_where_one_follows(said: str, role: Role, wanted: str) -> None:
    assert wanted in str(advice(said, role))
    assert "\n" not in advised(said, said, role)


def test_an_error_that_nobody_knows_stays_as_it_is() -> None:
    assert advice("ValueError: Unsupported head_dim=24", "sampler") is None
    assert advised("ValueError: x", "ValueError: x", "learner") == "ValueError: x"


HEAD = "(EngineCore pid=7) ERROR 11-20 22:40:21 [core.py:1512] "


def engine_said(*lines: str) -> list[str]:
    return [HEAD + line for line in lines]


def test_an_assertion_without_a_message_is_told_by_its_source_line(tmp_path: Path) -> None:
    lines = engine_said(
        '  File "vllm/lora/ops/triton_ops/lora_shrink_op.py", line 281, in _lora_shrink',
        "    assert inputs.dtype in [torch.float16, torch.bfloat16]",
        "           ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^",
        "AssertionError",
    )
    found = cause(tmp_path, *lines)
    assert found.startswith("AssertionError at `assert inputs.dtype in [torch.float16, torch.bfloat16]` -> vLLM's LoRA")
    assert "model.dtype=bfloat16" in found


def test_nccl_s_reason_stands_lines_below_the_exception_and_is_read(tmp_path: Path) -> None:
    lines = engine_said(
        "    work = group.barrier(opts=opts)",
        "torch.distributed.DistBackendError: NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:93, "
        "invalid usage (run with NCCL_DEBUG=WARN for details), NCCL version 2.29.7",
        "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.",
        "Last error:",
        "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 10",
    )
    found = cause(tmp_path, *lines)
    assert found.startswith("torch.distributed.DistBackendError: NCCL error in") and "two ranks on one GPU" in found
    system = cause(
        tmp_path, *lines[:2], *engine_said("ncclSystemError: System call (e.g. socket) failed.", "Last error:", "")
    )
    assert system.startswith("torch.distributed.DistBackendError") and "NCCL_SOCKET_IFNAME" in system


def test_an_engine_out_of_memory_is_one_line_with_keys(tmp_path: Path) -> None:
    found = cause(tmp_path, *engine_said("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.16 GiB."))
    assert found.count("\n") == 0 and "-> lower sampler.max_num_seqs" in found


def test_a_refusal_of_vllm_s_is_told_by_its_reason() -> None:
    """Its configuration is pydantic's, which wraps what vLLM raises."""

    class Refusing(BaseModel):
        dtype: str

        @field_validator("dtype")
        @classmethod
        def refuse(cls, value: str) -> str:
            raise ValueError(f"Bfloat16 is only supported on GPUs of 8.0 or later, not {value}")

    with pytest.raises(ValidationError) as caught:
        Refusing(dtype="7.5")
    reason = "Bfloat16 is only supported on GPUs of 8.0 or later, not 7.5 -> set model.dtype=float16"
    assert refusal(caught.value) == reason
    assert refusal(ValueError("one\ntwo")) == "one"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
    ids=["torch", "cuBLAS", "CUDA", "Triton"],
)
def test_the_learner_retries_with_less_whoever_ran_out_of_memory(error: Exception) -> None:
    assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
