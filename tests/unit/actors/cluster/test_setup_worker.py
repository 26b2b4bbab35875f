"""Our setup_worker.py starts the worker that Ray's starts, and leaves to it what it does not know."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray._private.workers as rays_workers

from actors.cluster import setup_worker

RAYS = Path(*rays_workers.__path__) / "setup_worker.py"
SEEN = "import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ), sys.flags.isolated]))"


@pytest.fixture
def worker(tmp_path: Path) -> Path:
    """In the place of Ray's worker program: says what it was started with. Ray's setup_worker.py is beside it."""
    (tmp_path / "setup_worker.py").symlink_to(RAYS)
    program = tmp_path / "default worker.py"
    program.write_text(SEEN)
    return program


def started(setup: Path | str, worker: Path, *arguments: str) -> Any:
    command = [sys.executable, str(setup), str(worker), *arguments]
    variables = {**os.environ, "A": "outer"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=variables, cwd=worker.parent)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "context",
    [
        {},
        {"env_vars": {"B": "with ' and \" and a space", "TMPDIR": "/x"}},
        {"env_vars": {"B": "5 $ and more"}},
        {"env_vars": {"A": "${A}:more", "C": "${UNSET}"}},
        {"env_vars": {"A": "1"}, "py_executable": shlex.join([sys.executable, "-I"])},
        {"command_prefix": ["export D=4 &&"], "env_vars": {"A": "1"}},
        {"override_worker_entrypoint": "another.py"},
    ],
    ids=["empty", "variables", "a dollar", "expanded", "another Python", "a prefix", "another program"],
)
def test_the_worker_starts_as_rays_program_starts_it(worker: Path, context: dict[str, Any]) -> None:
    (worker.parent / "another.py").write_text(SEEN)
    full = {"command_prefix": [], "env_vars": {}, "java_jars": [], "override_worker_entrypoint": None, **context}
    arguments = [
        "--node-ip-address=192.0.2.2", "--an-empty-one=", "--quoted='two words'", "--language=PYTHON",
        f"--serialized-runtime-env-context={json.dumps(full)}",
    ]  # fmt: skip
    ours = started(setup_worker.__file__, worker, *arguments)
    assert ours == started(RAYS, worker, *arguments)
    assert ours[0] == ["--node-ip-address=192.0.2.2", "--an-empty-one=", "--quoted='two words'"]


def test_it_imports_no_ray() -> None:
    code = f"import runpy, sys; runpy.run_path({setup_worker.__file__!r}); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "'ray" not in done.stdout and "'shlex'" not in done.stdout
