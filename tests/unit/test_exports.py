"""What `import rlsys` offers: every name is there, and the import itself loads nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import rlsys

ROOT = Path(__file__).parents[2]
HEAVY = ["torch", "ray", "vllm", "transformers", "peft", "datasets", "wandb", "pyarrow", "sympy"]


def fresh(code: str) -> list[str]:
    """Words that a new interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize("name", rlsys.__all__)
def test_every_exported_name_resolves(name: str) -> None:
    assert getattr(rlsys, name) is not None


def test_exports_are_sorted_and_listed_once() -> None:
    assert sorted(set(rlsys.__all__)) == sorted(rlsys.__all__)


def test_a_name_that_is_not_exported_is_an_attribute_error_that_names_it() -> None:
    with pytest.raises(AttributeError, match="module 'rlsys' has no attribute 'TrainingCliend'"):
        _ = rlsys.TrainingCliend


def test_importing_rlsys_imports_nothing_heavy() -> None:
    loaded = fresh(f"import rlsys, sys; print(*[name for name in {HEAVY} if name in sys.modules])")
    assert loaded == []


def test_a_star_import_gives_every_exported_name() -> None:
    names = fresh("from rlsys import *; print(*[name for name in dir() if not name.startswith('__')])")
    assert set(names) == set(rlsys.__all__) - {"__version__"}


def test_modules_of_actors_that_a_driver_loads_need_no_torch() -> None:
    modules = (
        "actors.sampler_actor, actors.learner_actor, actors.reward_actor, actors.advantage_actor, benchmarks.replaying"
    )
    script = f"import sys, {modules}; print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert said.splitlines()[-1] == "False"
