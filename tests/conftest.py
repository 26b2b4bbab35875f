"""The same examples in every run; HYPOTHESIS_PROFILE=new draws others, for a soak run. What vLLM's build rules out.
Which files one process runs (pytest-xdist with `--dist loadfile`).
"""

from __future__ import annotations

import atexit
import functools
import gc
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadFileScheduling

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
# Files and folders that share a cluster, a server, a deployment, or the import of vLLM: one process runs them. The
# longest begin first, so that no process is left with one of them at the end. Other files go to whichever is free.
SHARING = {
    "the cluster": ("ray",),
    "the server": ("serve",),
    "engines": ("engine", "families/test_engine.py", "families/test_adapters.py"),
    "tokenizers": ("real/test_tokenizers.py", "real/test_openai_text.py"),
    "the deployment": ("client",),
    "forked programs": (  # the server of tests/forked.py imports the learner, which takes seconds
        "unit/serve/test_slow_clients.py",
        "unit/distributed",
        "unit/learner/test_token_budget.py",
        "unit/tracking/test_tensorboard.py",
        "unit/test_forked.py",
        "unit/planning/test_growth.py",
        "unit/benchmarks/test_killed_gpu_check.py",
    ),
}
# They start a Ray of their own, and use no cluster of their folder.
OWN_RAY = (
    "ray/test_command.py",
    "ray/test_gpu_places.py",
    "ray/test_visible_gpus.py",
    "ray/test_wheel.py",
    "serve/test_stop.py",
)


class Sharing(LoadFileScheduling):  # type: ignore[misc]  # xdist has no types
    """All tests of a file in one process, and all that share what takes long to start."""

    def _split_scope(self, nodeid: str) -> str:
        file = file_of(nodeid)
        return shared_by(file) or file


def file_of(nodeid: str) -> str:
    """Named from tests/."""
    return nodeid.partition("::")[0].removeprefix("tests/")


@functools.cache
def shared_by(file: str) -> str | None:
    """What this file shares with others."""
    if file in OWN_RAY:
        return None
    path = Path(file)
    return next((what for what, places in SHARING.items() if any(path.is_relative_to(each) for each in places)), None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> Sharing | None:
    return Sharing(config, log) if config.getoption("dist") == "loadfile" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {what: at for at, what in enumerate(SHARING)}
    items.sort(key=lambda item: place.get(shared_by(file_of(item.nodeid)) or "", len(place)))
    build = vllm_build()
    if build is None or build.device == "cpu":
        return
    skip = pytest.mark.skip(
        reason=f"starts vLLM on the CPU, which {build} cannot do; `make test` installs the CPU build"
    )
    for item in items:
        if starts_engines_on_cpu(item.path) and item.get_closest_marker("gpu") is None:
            item.add_marker(skip)


if "PYTEST_XDIST_WORKER" in os.environ:
    atexit.register(os._exit, 0)  # the last to be called; to take all modules apart costs an interpreter four seconds
else:
    atexit.register(gc.unfreeze)  # triton would complain of what is never taken apart
gc.disable()  # until the modules are imported, which makes hardly any garbage


def pytest_collection_finish() -> None:
    """What is there now stays: no collection of garbage, pytest's last ones included, looks through it."""
    gc.freeze()
    gc.enable()


def starts_engines_on_cpu(path: Path) -> bool:
    inside = path.relative_to(TESTS)
    return any(inside.is_relative_to(each) for each in ENGINES_ON_CPU) and str(inside) not in NO_ENGINES
