"""What the learner would run on a GPU, on fake CUDA tensors: shapes, dtypes, devices, operators' schemas. No values, so
nothing of how right or how fast it is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from tests.waiting import run

HERE = Path(__file__).parent / "fake_cuda"
TORCH = Path(torch.__file__).parent
VARLEN, VARLEN_BACKWARD = "torch_attn._varlen_attn.default", "torch_attn._varlen_attn_backward.default"
# Collections of garbage during the imports, and the interpreter's end, would take two seconds.
PROGRAM = """
import gc, os, sys
gc.disable()
from tests.unit.learner.fake_cuda import program
program.main()
sys.stdout.flush()
os._exit(0)
"""
FUSED_ADAMW, PRODUCTS = "aten._fused_adamw_.default", "aten.bmm.default"

Seen = Mapping[str, Mapping[str, int]]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """Case -> how often it called each operator."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ here, which the stand-in for a CUDA device is compiled with")
    library = tmp_path_factory.mktemp("fake_cuda") / "device.so"
    flags = ["-std=c++20", "-shared", "-fPIC", f"-I{TORCH / 'include'}", f"-L{TORCH / 'lib'}", "-lc10", "-ltorch_cpu"]
    subprocess.run([compiler, str(HERE / "device.cpp"), *flags, "-o", str(library)], check=True, timeout=600)
    environment = {
        **os.environ,
        "LD_PRELOAD": str(library),
        "LD_LIBRARY_PATH": str(TORCH / "lib"),
        "PYTHONPATH": str(Path(__file__).parents[3]),
    }
    done = run([sys.executable, "-c", PROGRAM], env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    return {result.get("attention") or result["learner"]: result["seen"] for result in results}


@pytest.mark.parametrize("window", [None, 16])
def test_attention_in_half_precision_is_torch_s_variable_length_kernel_forward_and_backward(
    seen: Seen, window: int | None
) -> None:
    for dtype in ("bfloat16", "float16"):
        found = seen[f"torch.{dtype} window {window} cap None sinks False"]
        assert found[VARLEN] == found[VARLEN_BACKWARD] == 1
    assert VARLEN not in seen[f"torch.float32 window {window} cap None sinks False"]  # which it does not take


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("case", ["cap 30.0 sinks False", "cap None sinks True"])
@pytest.mark.parametrize("window", [None, 16])
def test_caps_and_sinks_are_computed_by_products_on_the_device(
    seen: Seen, dtype: str, case: str, window: int | None
) -> None:
    found = seen[f"torch.{dtype} window {window} {case}"]
    assert found[PRODUCTS] and VARLEN not in found


LAYERS, LOSSES, WAYS = 1, 5, 2


def test_losses_an_optimizer_step_and_a_checkpoint_pass_on_the_device(seen: Seen) -> None:
    for case in ("bfloat16 {} unembed False", "bfloat16 {} unembed True", "float32 {} unembed False"):
        assert seen[case][FUSED_ADAMW] == 1
    plain = seen["bfloat16 {} unembed False"]
    assert plain[VARLEN_BACKWARD] == LAYERS * LOSSES * WAYS
    assert plain[VARLEN] == plain[VARLEN_BACKWARD] + 2 * LAYERS  # log-probabilities, with the adapter and without


def test_checkpointed_layers_run_forward_twice_on_the_device(seen: Seen) -> None:
    (again,) = (found for case, found in seen.items() if "gradient_checkpointing" in case)
    assert again[VARLEN_BACKWARD] == LAYERS * WAYS
    assert again[VARLEN] == 2 * again[VARLEN_BACKWARD] + 2 * LAYERS
