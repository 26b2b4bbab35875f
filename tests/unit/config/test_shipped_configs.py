"""Claims about the shipped configs: what their headers say, and that they fit on the hardware named there."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from actors.cli import app
from rlsys.architectures.model_shape import model_shape
from rlsys.config import load_config
from rlsys.planning.fit import Node
from rlsys.planning.plan import plan

ROOT = Path(__file__).parents[3]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
GB = 10**9  # GPUs are sold by it; GiB would be generous
WANTED = {
    "quickstart",
    "gsm8k-qwen2.5-0.5b",
    "gsm8k-qwen2.5-1.5b",
    "gsm8k-qwen3-0.6b",
    "gsm8k-qwen3-1.7b",
    "gsm8k-qwen3-4b",
    "gsm8k-qwen3-8b",
    "gsm8k-qwen3-8b-8gpu",
    "math-qwen3-8b",
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
    assert measured or "The error of the prediction on CUDA, the duration and the result are unmeasured" in text
    assert nodes(text)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_config_fits_on_the_hardware_of_its_header(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where that is a CPU, it has kernels for the config's dtype. Without them the plan warns of twice the bytes."""
    monkeypatch.setattr("rlsys.architectures.precision.multiplies_bfloat16", lambda: True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = load_config(path)
    local = config.model.path is not None and config.model.path.startswith("models/")
    if local and not (path.parents[1] / str(config.model.path)).is_dir():
        pytest.skip(f"{config.model.path} is not here; `make real-model` brings it")
    found = plan(config, model_shape(config.model), nodes(header(path)))
    assert found.shortfalls == ()
    assert found.warnings == ()
    assert found.token_budget is not None
    assert config.learner.token_budget >= config.model.max_length or config.model.make is not None
    if config.sampler.colocate:  # the actors' shares of one GPU are added up when they are placed
        assert config.learner.num_gpus + config.sampler.num_gpus == 1


ON_GPU = [path for path in CONFIGS if "GPU" in header(path)]
SPARE, HALF = 0.9, 0.5  # of the GPU memory of a header


def with_gpus(node: Node, share: float) -> Node:
    assert node.gpu_memory is not None
    return replace(node, gpu_memory=int(share * node.gpu_memory))


def test_there_is_a_config_for_each_common_size_of_gpu() -> None:
    assert {node.gpu_memory for path in ON_GPU for node in nodes(header(path))} == {size * GB for size in SIZES}


SIZES = (24, 48, 80, 141)


@pytest.mark.parametrize("path", ON_GPU, ids=lambda path: path.stem)
def test_a_gpu_config_fits_with_room_to_spare_and_not_on_half_the_gpu(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config, (node,) = load_config(path), nodes(header(path))
    dims = model_shape(config.model)
    assert plan(config, dims, [with_gpus(node, SPARE)]).shortfalls == ()
    assert any("GPU memory" in one for one in plan(config, dims, [with_gpus(node, HALF)]).shortfalls)


@pytest.mark.parametrize("path", ON_GPU, ids=lambda path: path.stem)
def test_the_command_of_a_gpu_configs_header_finds_that_it_fits(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (line,) = re.findall(r"rlsys (plan \S+(?: --[a-z-]+ \d+)+)", header(path))
    (node,) = nodes(header(path))
    assert f"configs/{path.name} --gpu-memory-gb {node.gpu_memory // GB} " in line  # type: ignore[operator]
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, said = app(line.split(), standalone_mode=False), capsys.readouterr().out
    assert not code and "the job fits" in said, said


def test_every_config_that_docs_name_is_there() -> None:
    pages = [ROOT / "README.md", ROOT / "Makefile", *ROOT.glob("docs/*.md"), *ROOT.glob("deploy/*"), *CONFIGS]
    texts = {page: page.read_text("utf-8") for page in pages if page.is_file()}
    named = {(name, page.name) for page, text in texts.items() for name in re.findall(r"configs/([\w.-]+\.yaml)", text)}
    assert ("quickstart.yaml", "README.md") in named
    known = {path.name for path in CONFIGS}
    assert not {(name, page) for name, page in named if name not in known}


def test_a_header_with_too_small_a_machine_would_be_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = load_config(next(path for path in CONFIGS if path.stem == "gsm8k-qwen3-8b-8gpu"))
    assert plan(config, model_shape(config.model), nodes("4 GPUs of 80 GB; 32 CPU cores, 256 GB")).shortfalls
    assert plan(config, model_shape(config.model), nodes("8 GPUs of 24 GB; 32 CPU cores, 256 GB")).shortfalls
