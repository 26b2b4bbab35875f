"""Containers, paths, and what importing rlsys costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rlsys
from rlsys import losses, types
from rlsys.client.containers import outputs
from rlsys.client.paths import folder_of, path_of
from rlsys.client.results import LOSSES
from rlsys.errors import CheckpointError, LossError


def test_outputs_are_cut_by_datum_and_take_its_container() -> None:
    targets: list[Any] = [[1, 2], np.array([3]), torch.tensor([4, 5, 6]), types.TensorData([7])]
    data = [types.Datum(types.ModelInput.from_ints(list(range(len(one)))), {"target_tokens": one}) for one in targets]
    found = [row["logprobs"] for row in outputs(data, np.arange(7, dtype=np.float32))]
    assert [list(map(float, one)) for one in found] == [[0, 1], [2], [3, 4, 5], [6]]
    assert [type(one) for one in found] == [list, np.ndarray, torch.Tensor, types.TensorData]


def test_a_path_and_its_folder_belong_together(tmp_path: Path) -> None:
    path = path_of("abc:train:0", "weights", "step-3")
    assert path == "rlsys://abc:train:0/weights/step-3"
    assert folder_of(tmp_path, path) == tmp_path / "abc.train.0" / "weights" / "step-3"
    assert folder_of(tmp_path, path.replace("rlsys", "tinker")) == folder_of(tmp_path, path)


@pytest.mark.parametrize(
    "path",
    [
        "rlsys://abc/weights/..",
        "rlsys://../weights/a",
        "rlsys://abc.train.0/weights/a",  # the folder of abc:train:0
        "rlsys://abc/weights/a/b",
        "rlsys://abc/other/a",
        "rlsys://abc/weights/",
        "https://abc/weights/a",
    ],
)
def test_a_path_that_leaves_the_folder_is_refused(path: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        folder_of(tmp_path, path)


def test_the_losses_announced_are_those_that_resolve() -> None:
    for name in LOSSES[:-1]:
        assert losses.resolve(name).name == name
    with pytest.raises(LossError, match=", ".join(LOSSES[:-1])):
        losses.resolve("none of them")


def test_importing_rlsys_and_its_service_loads_no_heavy_library() -> None:
    code = (
        "import sys, rlsys; rlsys.ServiceClient; rlsys.types.Datum\n"
        "print(sorted({'ray', 'torch', 'vllm', 'transformers', 'peft'} & sys.modules.keys()))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_names_of_the_tinker_sdk_are_at_the_top() -> None:
    for name in (
        "ServiceClient",
        "TrainingClient",
        "SamplingClient",
        "Datum",
        "ModelInput",
        "TensorData",
        "AdamParams",
    ):
        assert hasattr(rlsys, name)
    assert types.Datum is rlsys.Datum
