"""The doctor, on things that are really broken: a version, a folder, a port, a limit, a token, a server."""

from __future__ import annotations

import os
import resource
import socket
import sys
import threading
from pathlib import Path

import psutil
import pytest

from actors import doctor
from actors.doctor import examine
from actors.machine.checks import Check
from rlsys.config import ClusterSection


def only(checks: list[Check]) -> Check:
    assert len(checks) == 1, checks
    return checks[0]


def fake_distribution(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_this_environment_is_in_range() -> None:
    assert only(doctor.python_version()).status == "ok"
    assert only(doctor.package_versions()).status == "ok"


def test_a_package_out_of_range_is_named_with_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_distribution(tmp_path, "peft", "0.9.0")
    monkeypatch.syspath_prepend(str(tmp_path))
    check = only(doctor.package_versions())
    assert (check.name, check.status) == ("peft", "fail")
    assert "0.9.0" in check.found and "0.21" in check.found
    assert "pip install" in check.remedy and "peft" in check.remedy


def test_another_vllm_than_the_one_known_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_distribution(tmp_path, "vllm", "0.31.2")
    monkeypatch.syspath_prepend(str(tmp_path))
    check = only(doctor.package_versions())
    assert (check.name, check.status) == ("vllm", "fail") and "0.31.2" in check.found


def test_packages_that_are_missing_fail_each_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    found = {check.name for check in doctor.package_versions() if check.status == "fail"}
    assert {"torch", "ray", "peft", "vllm"} <= found


def test_devices_say_cores_and_memory() -> None:
    check = only(doctor.devices())
    assert f"{len(os.sched_getaffinity(0))} cores" in check.found and "GiB free" in check.found


def test_a_disk_that_is_almost_full_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert doctor.disk("runs", tmp_path / "not" / "yet").status in ("ok", "warn")
    monkeypatch.setattr(doctor, "DISK_FAIL", 2**60)  # no disk has an EiB free
    monkeypatch.setattr(doctor, "DISK_WARN", 2**60)
    check = doctor.disk("runs", tmp_path)
    assert check.status == "fail" and "RAY_TMPDIR" in check.remedy


def test_a_folder_that_cannot_be_written_fails() -> None:
    check = doctor.disk("runs", Path("/proc/runs"))
    assert check.status == "fail" and "cannot be written" in check.found


def test_shared_memory_smaller_than_the_object_store_fails(tmp_path: Path) -> None:
    assert doctor.shared_memory(0.001).status == "ok"
    check = doctor.shared_memory(1e6)
    assert check.status == "fail" and "--shm-size=1000001g" in check.remedy
    assert doctor.shared_memory(0.5, tmp_path / "shm").status == "fail"


def test_a_port_that_is_taken_names_its_holder() -> None:
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        number = server.getsockname()[1]
        check = doctor.port(number, "a test")
    assert check.status == "warn" and f"pid {os.getpid()}" in check.found, check
    assert psutil.Process().name() in check.found
    assert doctor.port(number, "a test").status == "ok"


def test_few_open_files_are_warned_of() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
        check = doctor.open_files()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert check.status == "warn" and "512" in check.found and "ulimit -n" in check.remedy


def test_a_token_that_others_can_read_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert doctor.token_file().status == "ok"
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("0" * 64)
    token.chmod(0o644)
    check = doctor.token_file()
    assert check.status == "warn" and check.remedy == f"chmod 600 {token}"
    token.chmod(0o600)
    assert doctor.token_file().status == "ok"


def test_the_wandb_login_is_a_key_or_a_line_of_netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    check = doctor.wandb_login()
    assert check.status == "warn" and "wandb login" in check.remedy
    (tmp_path / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password x\n")
    assert doctor.wandb_login().status == "ok"
    monkeypatch.setenv("HOME", str(tmp_path / "other"))
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert doctor.wandb_login().status == "ok"


def test_a_hub_that_nobody_answers_for_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    check = doctor.hub()
    assert check.status == "warn" and "Connection refused" in check.found
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert doctor.hub().status == "ok"


def test_an_address_where_no_cluster_listens_fails_at_once() -> None:
    check = doctor.ray_answers("127.0.0.1:9")
    assert check.status == "fail" and "nothing answers" in check.found and "ray start --head" in check.remedy


def test_a_port_where_something_else_listens_fails_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "RAY_LIMIT_S", 3.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=lambda: _accept(server), daemon=True).start()
        check = doctor.ray_answers(f"127.0.0.1:{server.getsockname()[1]}")
    assert check.status == "fail", check


def _accept(server: socket.socket) -> None:
    held = []  # accepted and never answered
    while True:
        try:
            held.append(server.accept())
        except OSError:
            return


def test_a_vllm_that_cannot_be_imported_fails_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vllm.py").write_text("raise ImportError('libtorch is not what it was built for')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    check = doctor.vllm_imports()
    assert check.status == "fail" and "libtorch is not what it was built for" in check.found


def test_a_vllm_that_hangs_fails_within_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vllm.py").write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    check = doctor.vllm_imports(limit_s=3.0)
    assert check.status == "fail" and "no answer within 3 s" in check.found


def test_every_subject_of_the_doctor_is_examined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vllm.py").write_text("raise ImportError('not in this test')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    checks = {check.name: check for check in examine(ClusterSection(), tmp_path)}
    assert {"python", "devices", "GPU", "disk, runs", "disk, Ray's files", "shared memory", "port 6379", "port 8265",
            "open files", "Ray token", "wandb", "model hub", "ray", "vLLM"} <= checks.keys()  # fmt: skip
    assert checks["ray"].status == checks["vLLM"].status == "fail"
    assert all(check.remedy for check in checks.values() if check.status != "ok")
