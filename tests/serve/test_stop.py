"""The server's command under SIGTERM."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil

from tests import waiting
from tests.serve import conftest


def test_a_server_that_is_stopped_while_its_engine_starts_ends_with_0_and_leaves_no_process(
    base: str, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    process = conftest.start(conftest.configure(tmp_path, base), log)
    members: list[psutil.Process] = []
    try:
        waiting.until(lambda: has_engine(process.pid), "the sampler's process", process=process, state=log.read_text)
        members = waiting.family(process.pid)
        process.send_signal(signal.SIGTERM)
        assert waiting.exit_code(process, "the server") == 0, log.read_text()
        waiting.until_gone([each.pid for each in members], "processes of the server")
    finally:
        for each in {*members, *waiting.family(process.pid)}:
            if each.is_running():
                each.kill()
    text = log.read_text()
    assert text.rstrip().endswith("stopped") and "Traceback" not in text, text


def has_engine(pid: int) -> bool:
    """Whether the sampler's actor runs below this process."""
    names = []
    for each in waiting.family(pid):
        try:
            names.append(" ".join(each.cmdline()))
        except psutil.Error:
            continue
    return any("ServiceSampler" in name for name in names)
