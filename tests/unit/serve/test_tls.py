"""TLS: what is refused before anything starts, and a certificate that is renewed while the server runs."""

from __future__ import annotations

import logging
import re
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rlsys.errors import ConfigError
from rlsys.serve.tls import Certificate
from tests.unit.serve.certificates import issue, write

ROOT = issue("root")
BETWEEN = issue("between", ROOT)
SERVER = issue("server", BETWEEN)
OTHER = issue("server other", BETWEEN)
CHAIN = SERVER.pem + BETWEEN.pem

WRONG: dict[str, tuple[bytes, bytes, int, str]] = {
    "another key": (CHAIN, OTHER.key_pem(), 0o600, "does not fit the certificate .*: it is the key of another one"),
    "expired": (issue("server", ROOT, starts=-9, ends=-1).pem, b"", 0o600, "certificate 1 expired on 20"),
    "not yet valid": (issue("server", ROOT, starts=2).pem, b"", 0o600, "certificate 1 is not valid before 20"),
    "expired issuer": (b"", b"", 0o600, "certificate 2 expired on 20"),
    "issuer first": (BETWEEN.pem + SERVER.pem, SERVER.key_pem(), 0o600, "certificate is number 2 of 2; wanted"),
    "root before its child": (
        SERVER.pem + ROOT.pem + BETWEEN.pem,
        SERVER.key_pem(),
        0o600,
        "the issuer of certificate 1 is number 3; wanted it as number 2",
    ),
    "encrypted": (CHAIN, SERVER.key_pem(b"secret"), 0o600, "is encrypted; wanted a key without a passphrase"),
    "swapped": (SERVER.key_pem(), CHAIN, 0o600, "found no PEM certificate; it holds a private key: are the two"),
    "certificate twice": (CHAIN, CHAIN, 0o600, "found no PEM private key; it holds a certificate"),
    "empty": (b"", SERVER.key_pem(), 0o600, "found no PEM certificate$"),
    "cut": (SERVER.pem[:200], SERVER.key_pem(), 0o600, "found no PEM certificate$"),
    "cut key": (CHAIN, SERVER.key_pem()[:90], 0o600, "found no PEM private key$"),
    "bytes": (b"\x30\x82\xff", b"\x00\x01", 0o600, "found no PEM certificate$"),
    "readable by all": (CHAIN, SERVER.key_pem(), 0o644, "has mode 0644, so others can use it; wanted 0600"),
    "writable by a group": (CHAIN, SERVER.key_pem(), 0o660, "has mode 0660, so others can use it"),
}  # fmt: skip


def pair(name: str) -> tuple[bytes, bytes]:
    """The case's files; those about dates get a key that fits."""
    if name == "expired issuer":
        old = issue("between", ROOT, starts=-9, ends=-1)
        server = issue("server", old)
        return server.pem + old.pem, server.key_pem()
    if name in ("expired", "not yet valid"):
        found = issue("server", ROOT, starts=-9, ends=-1) if name == "expired" else issue("server", ROOT, starts=2)
        return found.pem, found.key_pem()
    return WRONG[name][:2]


@pytest.mark.parametrize("name", WRONG)
def test_files_that_clients_or_openssl_would_refuse_are_refused_first(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=WRONG[name][3]) as refused:
        Certificate(*write(tmp_path, *pair(name), WRONG[name][2]))
    assert re.match(r"bind\.tls_(certificate|key): /", str(refused.value)) and "secret" not in str(refused.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    certificate, key = write(tmp_path, CHAIN, SERVER.key_pem())
    with pytest.raises(ConfigError, match=r"bind\.tls_certificate: .*none: cannot be read: No such file"):
        Certificate(tmp_path / "none", key)
    with pytest.raises(ConfigError, match=r"bind\.tls_key: .*none: cannot be read: No such file"):
        Certificate(certificate, tmp_path / "none")
    with pytest.raises(ConfigError, match=r"bind\.tls_certificate: .* cannot be read: Is a directory"):
        Certificate(tmp_path, key)


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640])
def test_a_chain_with_its_key_is_loaded(mode: int, tmp_path: Path) -> None:
    found = Certificate(*write(tmp_path, CHAIN + ROOT.pem, SERVER.key_pem(), mode))
    assert found.expires == SERVER.certificate.not_valid_after_utc


def test_the_command_refuses_wrong_files_before_ray_is_imported(tmp_path: Path) -> None:
    certificate, key = write(tmp_path, CHAIN, OTHER.key_pem())
    options = ["--model", "m", "--tls-certificate", str(certificate), "--tls-key", str(key), f"keys={tmp_path}/keys"]
    command = [sys.executable, "-m", "rlsys", "serve", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    fault = f"does not fit the certificate {certificate}: it is the key of another one"
    assert done.stderr == f"ConfigError: bind.tls_key: {key}: {fault}\n"


def test_a_renewed_certificate_is_served_to_new_connections_and_a_wrong_one_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = write(tmp_path, CHAIN, SERVER.key_pem())
    found = Certificate(*files)
    with accepting(found.context) as served:
        assert served() == SERVER.certificate.serial_number
        renewed = issue("server", BETWEEN)
        write(tmp_path, renewed.pem + BETWEEN.pem, OTHER.key_pem())
        with caplog.at_level(logging.ERROR, "rlsys.serve"):
            for _ in range(3):
                found.refresh()
        assert len(caplog.records) == 1 and "the certificate before stays in use" in caplog.text
        assert served() == SERVER.certificate.serial_number
        write(tmp_path, renewed.pem + BETWEEN.pem, renewed.key_pem())
        found.refresh()
        assert served() == renewed.certificate.serial_number
        assert found.expires == renewed.certificate.not_valid_after_utc
        files[1].unlink()
        found.refresh()
        assert served() == renewed.certificate.serial_number


@contextmanager
def accepting(context: ssl.SSLContext) -> Iterator[Callable[[], int]]:
    """Connects as a client that trusts ROOT, and returns the serial number of the certificate that it is shown."""
    client = ssl.create_default_context(cadata=ROOT.pem.decode())

    def served() -> int:
        theirs, ours = socket.socketpair()

        def accept() -> None:
            with theirs, context.wrap_socket(theirs, server_side=True) as connection:
                connection.recv(1)

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            with ours, client.wrap_socket(ours, server_hostname="localhost") as connection:
                shown = connection.getpeercert()
                connection.sendall(b"x")
        finally:
            thread.join(30)
        assert shown is not None
        return int(str(shown["serialNumber"]), 16)

    yield served


def test_old_versions_of_tls_are_not_spoken(tmp_path: Path) -> None:
    found = Certificate(*write(tmp_path, CHAIN, SERVER.key_pem()))
    assert found.context.minimum_version == ssl.TLSVersion.TLSv1_2
