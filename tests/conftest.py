"""The same examples in every run; HYPOTHESIS_PROFILE=new draws others, for a soak run. What vLLM's build rules out."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from rlsys.sampler.vllm_build import vllm_build
from tests.waiting import USUAL_PRIORITY

os.environ.update({**USUAL_PRIORITY, **os.environ})

# How long an example takes says how busy the machine is; a claim about time measures CPU time itself.
TIMELESS = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("fixed", TIMELESS, derandomize=True, database=None)
settings.register_profile("new", TIMELESS, database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

TESTS = Path(__file__).parent
# Folders and files whose tests start vLLM engines on the CPU, and files in them that start none.
ENGINES_ON_CPU = (
    "client",
    "deploy/test_entry_commands.py",
    "deploy/test_tls.py",
    "engine",
    "families/test_engine.py",
    "nodes",
    "ray",
    "real/test_model.py",
    "serve",
    "soak",
)
NO_ENGINES = ("nodes/test_machines.py", "ray/test_columns.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    build = vllm_build()
    if build is None or build.device == "cpu":
        return
    skip = pytest.mark.skip(
        reason=f"starts vLLM on the CPU, which {build} cannot do; `make test` installs the CPU build"
    )
    for item in items:
        if starts_engines_on_cpu(item.path) and item.get_closest_marker("gpu") is None:
            item.add_marker(skip)


gc.disable()  # until the modules are imported, which makes hardly any garbage


def pytest_collection_finish() -> None:
    """What is there now stays, so that the collector of garbage need not look through it at each turn."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


def starts_engines_on_cpu(path: Path) -> bool:
    inside = path.relative_to(TESTS)
    return any(inside.is_relative_to(each) for each in ENGINES_ON_CPU) and str(inside) not in NO_ENGINES
