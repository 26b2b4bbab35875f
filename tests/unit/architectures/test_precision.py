"""A CPU without kernels for bfloat16 computes in float32, with a base whose weights are bfloat16's."""

from __future__ import annotations

import platform
from typing import Literal

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlsys.architectures.precision import computing_dtype, multiplies_bfloat16, multiplies_float16, of_cpuinfo
from rlsys.config import LearnerSection, LoraSection, ModelSection
from rlsys.learner.learner import Learner
from tests.unit.tiny_learner import Models


def cpuinfo(key: str, flags: str) -> str:
    return f"processor\t: 0\n{key}\t\t: {flags}\nbogomips\t: 1\n\nprocessor\t: 1\n{key}\t\t: {flags}\n"


@pytest.mark.parametrize(
    ("machine", "key", "flags", "has"),
    [
        ("x86_64", "flags", "fpu avx2 avx512f avx512bw avx512dq avx512vl", True),
        ("x86_64", "flags", "fpu avx2 avx_vnni avx_ne_convert", True),
        ("x86_64", "flags", "fpu avx2 fma f16c", False),
        ("x86_64", "flags", "fpu avx2 avx512f avx512dq", False),
        ("x86_64", "flags", "fpu avx2 bf16", False),
        ("aarch64", "Features", "fp asimd bf16 i8mm", True),
        ("aarch64", "Features", "fp asimd", False),
        ("aarch64", "flags", "bf16", False),
    ],
)
def test_a_cpu_has_bfloat16_by_its_flags(machine: str, key: str, flags: str, has: bool) -> None:
    assert of_cpuinfo(cpuinfo(key, flags), machine) is has


def test_of_an_unknown_cpu_nothing_is_expected() -> None:
    assert not of_cpuinfo("", "x86_64") and not of_cpuinfo(cpuinfo("flags", "avx_ne_convert"), "riscv64")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="torch asks another library on Arm")
def test_torch_says_the_same_of_this_cpu() -> None:
    assert multiplies_bfloat16() == torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert multiplies_float16() == torch.ops.mkldnn._is_mkldnn_fp16_supported()


def test_only_half_precision_on_a_cpu_is_ever_computed_in_something_else() -> None:
    assert computing_dtype("float16", "cuda") == "float16"
    assert computing_dtype("float16", "cpu") == ("float16" if multiplies_float16() else "float32")
    assert computing_dtype("float32", "cpu") == computing_dtype("float32", "cuda") == "float32"
    assert computing_dtype("bfloat16", "cuda") == "bfloat16"
    assert computing_dtype("bfloat16", "cpu") == ("bfloat16" if multiplies_bfloat16() else "float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_whatever_it_computes_in_a_learner_has_the_weights_of_its_dtype(
    tiny_model: Models, dtype: Literal["bfloat16", "float16"]
) -> None:
    path = tiny_model(True)
    learner = Learner(path, ModelSection(path=str(path), dtype=dtype, max_length=64), LearnerSection())
    learner.runs.create("run", LoraSection(rank=4), seed=0)
    assert learner.computing_dtype == computing_dtype(dtype, "cpu")
    tokens = np.random.default_rng(0).integers(0, learner.vocab_size, 40).astype(np.int32)
    found = learner.logprobs("run", tokens, np.array([0, 40]))[1:]
    rounded = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).float()
    with torch.no_grad():
        logp = rounded(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].log_softmax(-1)
    wanted = logp[:-1].gather(1, torch.from_numpy(tokens[1:].astype(np.int64))[:, None])[:, 0].numpy()
    bound = 1e-5 if learner.computing_dtype == "float32" else 5e-2
    assert np.abs(found - wanted).mean() < bound
