"""vLLM's private API, read from Python sources alone: what the engine's tests run on CPU is what CUDA's build holds."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from rlsys.sampler.private_api import CHECKED, CPU_ONLY, PINNED, PRIVATE_API, minor, unknown_version
from tests.unit.sampler.vllm_sources import (
    ATTRIBUTES,
    RECORD,
    assigned,
    digests,
    function,
    parameters,
    sources,
    version,
)


def installed() -> Path:
    """The folder in which the installed vLLM lies, without importing it."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parents[1]


def record() -> tuple[str, dict[str, str]]:
    head, *lines = RECORD.read_text().splitlines()
    return head.partition(":")[0].removeprefix("# "), dict(line.split() for line in lines)


@pytest.fixture(params=["installed", "RLSYS_VLLM_SOURCES"])
def site_packages(request: pytest.FixtureRequest) -> Path:
    """Of the installed vLLM, and of another one (installed elsewhere or unpacked) that the environment names."""
    if request.param == "installed":
        return installed()
    folder = os.environ.get(request.param)
    if not folder:
        pytest.skip("RLSYS_VLLM_SOURCES names no other vLLM, such as the site-packages of .venv-cuda")
    return Path(folder)


def test_the_engines_tests_run_on_the_python_sources_of_the_build_for_cuda() -> None:
    """The record is of the CUDA build; the installed one is the CPU's, wherever these tests run without a GPU."""
    of, wanted = record()
    name, _, number = of.partition(" ")
    assert (name, minor(number)) == ("vllm", PINNED), (
        f"{RECORD.name} is of {of}; make it again from the pinned CUDA build"
    )
    found = digests(installed())
    differ = sorted(module for module in wanted.keys() | found.keys() if wanted.get(module) != found.get(module))
    assert not differ, (
        f"{version(installed())} differs from {of} in {', '.join(differ)}: what passes on CPU says nothing about these"
    )
    assert len(wanted) > 30


def test_private_functions_take_the_parameters_that_the_engine_passes(site_packages: Path) -> None:
    for path, wanted in PRIVATE_API.items():
        definition = function(site_packages, path)
        assert definition is not None, f"{path} is gone"
        assert parameters(definition) == wanted.split(), path


def test_attributes_that_the_adapter_extension_reads_are_assigned_by_workers_for_cuda(site_packages: Path) -> None:
    files = dict(sources(site_packages))
    for module, names in ATTRIBUTES.items():
        assert module not in CPU_ONLY
        assert set(names) <= assigned(files[module]), module


def test_both_runners_for_cuda_hold_their_adapters_as_the_extension_reads_them(site_packages: Path) -> None:
    files = dict(sources(site_packages))
    for module in ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner"):
        assert "LoRAModelRunnerMixin" in files[module].read_text(), module


def test_the_installed_version_is_one_that_was_checked(site_packages: Path) -> None:
    assert minor(version(site_packages).split()[1]) in CHECKED


def test_a_version_that_nobody_checked_is_refused_with_what_is_known_and_what_to_install() -> None:
    said = unknown_version("0.41.0", "cuda", [])
    assert said.startswith("vLLM 0.41.0 is installed, and rlsys knows 0.32 and 0.33; ")
    assert f"the {len(PRIVATE_API)} private functions" in said and "nobody has read what they do" in said
    assert said.endswith("make set-up DEVICE=cuda installs 0.32, as requirements/gpu.txt pin it")
    said = unknown_version("0.41.0", "cpu", ["a:b is gone", "c:d takes ['x'], not ['y']"])
    assert "2 differ: a:b is gone; c:d takes ['x'], not ['y']" in said and "requirements/cpu.txt" in said


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("0.32.0", "0.32"), ("0.32.1+cpu", "0.32"), ("0.320.0", "0.320"), ("0.33.0rc1", "0.33"), ("dev", "dev")],
)
def test_a_version_is_compared_by_its_first_two_numbers(text: str, wanted: str) -> None:
    assert minor(text) == wanted
