"""`make gpu-check` runs on a machine that has torch, transformers and peft with what they need, and nothing else."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks import gpu_check
from benchmarks.gpu_journal import read_facts
from benchmarks.gpu_numerics import visible
from benchmarks.gpu_parts import (
    QUICK,
    QWEN3_8B,
    RUN,
    LearnerValues,
    LoraValues,
    ModelValues,
    learner_of,
    write_base,
)
from rlsys.config import LearnerSection, LoraSection, ModelSection, Section
from rlsys.modeling.prefix_layout import ALONE
from tests.waiting import run

ROOT = Path(__file__).parents[3]
UNUSED = {"typer", "pydantic"}  # of transformers' own command line, which is not run; a GPU machine may be without
ABSENT = {"ray", "vllm", "pytest", "hypothesis", "wandb", "datasets", "math_verify", "blake3", *UNUSED}
Called = Callable[..., int | str | None]
PLACEMENT = {"num_workers", "num_cpus", "num_gpus", "resources", "nodes", "placement", "cores"}


def needed(*names: str) -> set[str]:
    """These distributions and all that they need, as they are installed here, without what is unused."""
    found: set[str] = set()
    left = list(names)
    while left:
        name = canonicalize_name(left.pop())
        if name in found | UNUSED:
            continue
        found.add(name)
        for line in metadata.requires(name) or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                left.append(requirement.name)
    return found


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of links to what those three need: with it alone on the path, nothing else can be imported."""
    folder = tmp_path_factory.mktemp("packages")
    for name in needed("torch", "transformers", "peft"):
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            if not (folder / top).exists():
                (folder / top).symlink_to(str(distribution.locate_file(top)))
    return folder


def test_it_passes_on_a_cpu_with_torch_transformers_and_peft_alone(packages: Path, tmp_path: Path) -> None:
    assert not ABSENT & {path.name for path in packages.iterdir()}
    command = [sys.executable, "-S", "-m", "benchmarks.gpu_check", "--device", "cpu", "--repeats", "1"]
    ran = run(
        [*command, "--out", str(tmp_path)],
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path),
            "PYTHONPATH": f"{packages}:{ROOT}",
            "OMP_NUM_THREADS": "1",
        },
        cwd=tmp_path,
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    assert found["failed"] == [] and len(found["checks"]) > 100
    assert all(line.startswith("PASS") for line in ran.stdout.splitlines() if line.startswith(("PASS", "FAIL")))
    facts = read_facts(tmp_path)
    assert [fact["fact"] for fact in facts if "passed" in fact] == [check["name"] for check in found["checks"]]
    ended = [fact["part"] for fact in facts if fact["fact"] == "part" and fact["value"] == "done"]
    assert ended == found["parts"]["done"]
    rows = ["row 1.7b 4096", "row 8b 4096", "row 8b 16384", "row 1.7b 16384"]
    first = ["positions", "packing", "sharing", "attention", "attention with windows"]
    assert ended[: len(first) + len(rows)] == first + rows and len(ended) > 15
    assert {size for _, size in gpu_check.ROWS} == set(gpu_check.TINY_SIZES)
    for kind, size in gpu_check.ROWS:
        row = json.loads((tmp_path / f"cpu_tiny-{kind}_{gpu_check.TINY_SIZES[size]}.json").read_text())
        assert all(rate > 0 for rates in row["sides"].values() for rate in rates)
        assert {"share of 790 TFLOP/s", "share of 989 TFLOP/s"} <= row["more"].keys()


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Called:
    """Calls the command in this process, which has torch imported, and returns its exit code."""

    def call(*arguments: str) -> int | str | None:
        monkeypatch.setattr(sys, "argv", ["gpu_check", *arguments])
        try:
            return gpu_check.main()
        except SystemExit as end:
            return end.code

    return call


def test_parts_for_which_there_is_no_time_are_left_out_by_name(
    called: Called, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = called("--device", "cpu", "--minutes", "0.01", "--out", str(tmp_path))
    said = capsys.readouterr().out
    assert code == gpu_check.MISSING, said
    facts = read_facts(tmp_path)
    left_out = [fact["part"] for fact in facts if fact["value"] == "left out"]
    assert left_out[0] == "positions" and "row 8b 16384" in left_out and "greedy" in left_out
    assert json.loads((tmp_path / "gpu_check.json").read_text())["parts"]["left out"] == left_out
    assert all(f"LEFT OUT  {name}" in said.splitlines() for name in left_out)


def test_a_random_base_as_deep_as_the_real_ones_can_be_trained_packed(tmp_path: Path) -> None:
    deep = {**QUICK, "num_hidden_layers": QWEN3_8B["num_hidden_layers"]}
    write_base(tmp_path / "base", deep, "bfloat16", "cpu", 64, spread=0.03)
    learner = learner_of(tmp_path / "base", LearnerValues(), "bfloat16", 64, torch.float32)
    assert np.isfinite(learner.logprobs(RUN, np.arange(1, 30), np.array([0, 29]))).all()


def test_a_part_that_does_not_exist_is_refused_with_those_that_do(
    called: Called, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called("--device", "cpu", "--check", "shering", "--out", str(tmp_path)) == 2
    assert "'shering': no such part; there is positions, packing, sharing" in capsys.readouterr().err


def test_what_a_token_sees_through_a_window_counts_the_prompt_that_it_reads() -> None:
    """A prompt of 3 tokens, and 2 tokens that read it; a window of 3 holds a token and the 2 before it."""
    wanted = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert visible((3, 2), (ALONE, 0), window=3).int().tolist() == wanted


@pytest.mark.parametrize(
    ("values", "section", "left_out"),
    [(ModelValues, ModelSection, set()), (LoraValues, LoraSection, set()), (LearnerValues, LearnerSection, PLACEMENT)],
)
def test_its_sections_have_the_keys_and_defaults_of_a_job(
    values: Any, section: type[Section], left_out: set[str]
) -> None:
    wanted = {name: field.default for name, field in section.model_fields.items() if name not in left_out}
    made = values()
    derived = {name for name in vars(section) if isinstance(vars(section)[name], property)}  # a learner's device
    names = {field.name for field in fields(values)} - derived
    assert {name: getattr(made, name) for name in names} == wanted


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_what_it_wants(
    called: Called, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called("--out", str(tmp_path)) == 2
    assert "wanted one, or --device cpu" in capsys.readouterr().err
