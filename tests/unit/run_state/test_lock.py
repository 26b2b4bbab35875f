"""One driver at a time writes a run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rlsys.errors import ConfigError, RunExistsError
from rlsys.run_state.run_dir import RunStore
from tests.unit.run_state.run_stores import config, saved


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    saved(config(tmp_path), 1)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "kept" / "lock").unlink()
    (tmp_path / "kept" / "lock").symlink_to(victim)
    with pytest.raises(ConfigError, match="symbolic links"):
        RunStore.open(config(tmp_path), fresh=True)
    assert victim.read_text() == "precious"


def test_a_second_driver_is_refused_and_told_who_is_at_work(tmp_path: Path) -> None:
    with RunStore.open(config(tmp_path)):
        for fresh in (False, True):
            with pytest.raises(RunExistsError, match=rf"process {os.getpid()} on .*since"):
                RunStore.open(config(tmp_path), fresh)
    RunStore.open(config(tmp_path)).close()
