"""Claims about environments that clusters have: each is served, or is one line that names the variable."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from actors import doctor
from actors.cluster.process_environment import OWN_BELOW, RAY_BELOW, SOCKET_LIMIT, check_process_environment, faults
from rlsys.errors import ClusterError


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_TMPDIR", "TMPDIR", "TEMP", "TMP"):
        monkeypatch.delenv(name, raising=False)


def told(starts_ray: bool = True) -> str:
    with pytest.raises(ClusterError) as caught:
        check_process_environment(starts_ray)
    assert "\n" not in str(caught.value)
    failing = [check for check in doctor.surroundings(starts_ray) if check.status == "fail"]
    assert failing and all(check.found in str(caught.value) for check in failing), "the doctor says the same"
    return str(caught.value)


def test_an_ordinary_environment_has_no_fault() -> None:
    check_process_environment(starts_ray=True)
    assert {check.status for check in doctor.surroundings(True)} <= {"ok", "warn"}


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_a_long_path_names_the_variable_and_how_much_room_there_is(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    monkeypatch.setenv(variable, str(folder))
    assert f"{variable}: {folder} has" in told() and f"allow at most {SOCKET_LIMIT - RAY_BELOW}" in told()


def test_the_room_is_counted_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path("/tmp") / ("ü" * 30)
    folder.mkdir(exist_ok=True)
    try:
        monkeypatch.setenv("TMPDIR", str(folder))
        assert "TMPDIR" in told()
    finally:
        folder.rmdir()


def test_a_job_that_joins_a_cluster_needs_room_for_its_own_sockets_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path("/tmp") / ("x" * (SOCKET_LIMIT - OWN_BELOW - 5))
    folder.mkdir(exist_ok=True)
    try:
        monkeypatch.setenv("TMPDIR", str(folder))
        check_process_environment(starts_ray=False)
        assert "TMPDIR" in told(starts_ray=True)
    finally:
        folder.rmdir()


def test_a_temporary_folder_that_is_missing_is_not_replaced_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    assert f"TMPDIR: {tmp_path / 'none'} is not a folder" in told()


def test_a_temporary_folder_that_is_a_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "file"))
    assert "RAY_TMPDIR" in told()


def test_a_temporary_folder_that_cannot_be_written_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/proc")  # not even root may
    assert "TMPDIR: /proc cannot be written" in told()


def test_no_home_is_told_with_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", _nobody)
    assert "HOME is not set" in told()


def test_a_home_that_cannot_be_written_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/nonexistent")
    check_process_environment(starts_ray=True)
    assert [(fault.name, fault.fatal) for fault in faults(True)] == [("home", False)]
    assert "HOME: /nonexistent is not a folder" in doctor.surroundings(True)[0].found


def test_a_user_without_an_entry_needs_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", _nobody)
    assert "LOGNAME" in told()
    monkeypatch.setenv("LOGNAME", "trainer")
    monkeypatch.setenv("HOME", "/tmp")
    check_process_environment(starts_ray=True)


def _nobody(number: int) -> pwd.struct_passwd:
    raise KeyError(f"getpwuid(): uid not found: {number}")


def test_a_variable_that_is_set_but_empty_is_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "")
    check_process_environment(starts_ray=True)
    assert "TMPDIR" not in os.environ
