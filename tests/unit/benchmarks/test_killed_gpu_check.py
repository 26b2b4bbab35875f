"""`make gpu-check` that does not reach its end."""

from __future__ import annotations

import signal
from pathlib import Path

from benchmarks.gpu_journal import read_facts
from tests.forked import forked
from tests.waiting import cpu_of, until


def test_a_run_that_is_killed_leaves_every_fact_that_was_known(tmp_path: Path) -> None:
    def seen() -> list[str]:
        said = (tmp_path / "stdout").read_text() if (tmp_path / "stdout").exists() else ""
        return [line for line in said.splitlines() if line.startswith("PASS")]

    program = "import sys; from benchmarks.gpu_check import main; sys.exit(main())"
    with forked(program, "--device", "cpu", "--skip-rows", "--out", str(tmp_path), folder=tmp_path) as process:
        assert process.pid is not None
        until(lambda: len(seen()) >= 5 or not process.is_alive(), "five checks", cpu_of(process.pid))
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "stderr").read_text()
    checks = [fact for fact in read_facts(tmp_path) if "passed" in fact]
    assert len(checks) >= 5 and not (tmp_path / "gpu_check.json").exists()
    assert all(check["fact"] in line for check, line in zip(checks, seen(), strict=False))
