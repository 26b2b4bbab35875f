"""An engine's own words about its end reach the user."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FATAL = "(EngineCore pid=7) ERROR 11-20 22:40:21 [core.py:1512] RuntimeError: Unsupported head_dim=24"
PROGRAM = """
import os, sys
from rlsys.sampler.postmortem import EngineLog
print("ValueError: long ago", flush=True)
log = EngineLog()
for line in sys.argv[1:]:
    os.write(1, (line + "\\n").encode())
os.write(2, log.cause().encode())
"""


def cause(tmp_path: Path, *lines: str) -> str:
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        subprocess.run([sys.executable, "-c", PROGRAM, *lines], stdout=out, stderr=err, check=True)
    return (tmp_path / "err").read_text()


@pytest.mark.parametrize(
    "lines",
    [
        ["(EngineCore pid=7) ERROR 11-20 22:40:21 [core.py:1512] Traceback (most recent call last):", FATAL],
        [FATAL, "(MainProcess pid=5) ERROR 11-20 22:40:22 [async_llm.py:906] EngineDeadError: see above"],
        [FATAL.partition("] ")[2]],
    ],
    ids=["logged", "another process has the last word", "before vLLM has the process in hand"],
)
def test_the_last_error_of_the_engine_is_the_cause(tmp_path: Path, lines: list[str]) -> None:
    assert cause(tmp_path, *lines).startswith("RuntimeError: Unsupported head_dim=24 (all of it in ")


def test_an_engine_without_last_words_was_killed(tmp_path: Path) -> None:
    found = cause(tmp_path, "(EngineCore pid=7) INFO 11-20 22:40:21 [core.py:1] fine")
    assert found.startswith("its process ended without a word") and str(tmp_path / "out") in found


def test_a_worker_s_own_error_is_the_cause_and_not_that_the_engine_heard_of_it(tmp_path: Path) -> None:
    worker = FATAL.replace("EngineCore", "Worker_TP1")
    heard = FATAL.replace("Unsupported head_dim=24", "Worker failed with error 'x', please check the stack trace")
    assert cause(tmp_path, worker, heard).startswith("RuntimeError: Unsupported head_dim=24 (all of it in ")
