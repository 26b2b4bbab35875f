"""Environment variables for a while."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from rlsys.utils.env_variables import changed_variables


def test_variables_are_changed_for_the_processes_of_a_block_and_then_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLSYS_TEST_OLD", "old")
    monkeypatch.delenv("RLSYS_TEST_NEW", raising=False)
    show = "import os; print(os.environ['RLSYS_TEST_OLD'], os.environ['RLSYS_TEST_NEW'])"
    with changed_variables(RLSYS_TEST_OLD="other", RLSYS_TEST_NEW="new"):
        assert subprocess.check_output([sys.executable, "-S", "-c", show], text=True) == "other new\n"
    assert os.environ["RLSYS_TEST_OLD"] == "old" and "RLSYS_TEST_NEW" not in os.environ
