"""`make gpu-check` runs on a machine that has torch, transformers and peft with what they need, and nothing else."""

from __future__ import annotations

import json
import os
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks.gpu_parts import LearnerValues, LoraValues, ModelValues
from rlsys.config import LearnerSection, LoraSection, ModelSection, Section
from tests.waiting import run

ROOT = Path(__file__).parents[2]
UNUSED = {"typer", "pydantic"}  # of transformers' own command line, which is not run; a GPU machine may be without
ABSENT = {"ray", "vllm", "pytest", "hypothesis", "wandb", "datasets", "math_verify", "blake3", *UNUSED}
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
                (folder / top).symlink_to(distribution.locate_file(top))
    return folder


def test_it_passes_on_a_cpu_with_torch_transformers_and_peft_alone(packages: Path, tmp_path: Path) -> None:
    assert not ABSENT & {path.name for path in packages.iterdir()}
    command = [sys.executable, "-S", "-m", "benchmarks.gpu_check", "--device", "cpu", "--quick", "--repeats", "1"]
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
    row = json.loads((tmp_path / "h200_quick_512.json").read_text())
    assert all(rate > 0 for rates in row["sides"].values() for rate in rates)


@pytest.mark.parametrize(
    ("values", "section", "left_out"),
    [(ModelValues, ModelSection, set()), (LoraValues, LoraSection, set()), (LearnerValues, LearnerSection, PLACEMENT)],
)
def test_its_sections_have_the_keys_and_defaults_of_a_job(
    values: type, section: type[Section], left_out: set[str]
) -> None:
    wanted = {name: field.default for name, field in section.model_fields.items() if name not in left_out}
    made = values()
    assert {name: getattr(made, name) for name in values.__dataclass_fields__} == wanted


def test_without_a_gpu_it_says_what_it_wants(tmp_path: Path) -> None:
    ran = run(
        [sys.executable, "-m", "benchmarks.gpu_check"],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
    )
    assert ran.returncode == 2 and "wanted one, or --device cpu" in ran.stderr
