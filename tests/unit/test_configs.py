"""Claims about the shipped configs: what their headers say, and that they fit on the hardware named there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rlsys.config import load_config
from rlsys.dimensions import dimensions
from rlsys.planning import Node, plan

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
GB = 10**9  # GPUs are sold by it; GiB would be generous
WANTED = {
    "quickstart",
    "gsm8k-qwen2.5-0.5b",
    "gsm8k-qwen2.5-1.5b",
    "gsm8k-qwen3-0.6b",
    "gsm8k-qwen3-1.7b",
    "gsm8k-qwen3-8b-8gpu",
    "math-qwen3-1.7b",
    "calculator",
}


def header(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    return " ".join(
        line.removeprefix("#").strip() for line in lines[: next(i for i, s in enumerate(lines) if s[:1] != "#")]
    )


def nodes(text: str) -> list[Node]:
    """The machine that a header names: "8 GPUs of 80 GB ...; 32 CPU cores, 256 GB"."""
    cores = re.search(r"(\d+) CPU cores?, (\d+) Gi?B", text)
    assert cores is not None, text
    gpus = re.search(r"(\d+) GPUs? of (\d+) GB", text)
    resources = {"CPU": float(cores[1]), **({"GPU": float(gpus[1])} if gpus else {})}
    return [Node("header", resources, int(cores[2]) * GB, int(gpus[2]) * GB if gpus else None)]


def test_the_jobs_that_people_come_for_are_there() -> None:
    assert {path.stem for path in CONFIGS} >= WANTED


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_header_says_hardware_duration_and_result_or_that_they_were_not_measured(path: Path) -> None:
    text = header(path)
    measured = re.search(r"\d+ (s|min|h)\b", text) and "->" in text
    assert measured or "not yet measured there" in text
    assert nodes(text)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_config_fits_on_the_hardware_of_its_header(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = load_config(path)
    local = config.model.path is not None and config.model.path.startswith("models/")
    if local and not (path.parents[1] / str(config.model.path)).is_dir():
        pytest.skip(f"{config.model.path} is not here; `make real-model` brings it")
    found = plan(config, dimensions(config.model), nodes(header(path)))
    assert found.shortfalls == ()
    assert found.warnings == ()
    assert found.token_budget is not None
    assert config.learner.token_budget >= config.model.max_length or config.model.make is not None
    if config.sampler.colocate:  # the actors' shares of one GPU are added up when they are placed
        assert config.learner.num_gpus + config.sampler.num_gpus == 1


def test_a_header_with_too_small_a_machine_would_be_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = load_config(next(path for path in CONFIGS if path.stem == "gsm8k-qwen3-8b-8gpu"))
    assert plan(config, dimensions(config.model), nodes("4 GPUs of 80 GB; 32 CPU cores, 256 GB")).shortfalls
    assert plan(config, dimensions(config.model), nodes("8 GPUs of 24 GB; 32 CPU cores, 256 GB")).shortfalls
