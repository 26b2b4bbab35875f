"""The server's TLS certificate: checked before anything starts, and loaded again when its files change."""

from __future__ import annotations

import logging
import ssl
import stat
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from rlsys.errors import ConfigError
from rlsys.serve.config import Bind

CERTIFICATE, KEY = "bind.tls_certificate", "bind.tls_key"
OPEN_TO_OTHERS = 0o037  # a group may read the key, as Debian's ssl-cert does; nobody else may
log = logging.getLogger("rlsys.serve")

Stamp = tuple[tuple[int, int, int], ...]


class Certificate:
    """A certificate chain and its key, as an `ssl.SSLContext`. New connections get what the files hold.

    Raises:
        ConfigError: a file is missing, open to others or no PEM; the key is encrypted or another certificate's; a
            certificate is not valid now, or they are in another order than that of the chain.
    """

    def __init__(self, certificate: Path, key: Path) -> None:
        self._certificate, self._key = certificate, key
        self._error = ""
        self._stamp: Stamp = self._found()
        self.expires = check(certificate, key)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._load(self.context)

    def refresh(self) -> None:
        """Load changed files. While they are wrong, the certificate before stays in use, and the log says why."""
        try:
            stamp = self._found()
            if stamp == self._stamp:
                return
            expires = check(self._certificate, self._key)
            self._load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))  # one that fails leaves the served context as it is
            self._load(self.context)
            self._stamp = stamp
        except ConfigError as error:
            if self._error != str(error):
                log.error("the certificate before stays in use: %s", error)
            self._error, self._stamp = str(error), ()
            return
        self.expires, self._error = expires, ""
        log.warning("%s: loaded again; it ends on %s", self._certificate, f"{expires:%Y-%m-%d}")

    def _load(self, context: ssl.SSLContext) -> None:
        try:
            context.load_cert_chain(self._certificate, self._key)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"{CERTIFICATE}: {self._certificate}: OpenSSL refuses it: {error}") from None

    def _found(self) -> Stamp:
        stamps = []
        for name, path in ((CERTIFICATE, self._certificate), (KEY, self._key)):
            try:
                found = path.stat()
            except OSError as error:
                raise ConfigError(f"{name}: {path}: cannot be read: {error.strerror}") from None
            stamps.append((found.st_mtime_ns, found.st_size, found.st_ino))
        return tuple(stamps)


def certificate_of(bind: Bind) -> Certificate | None:
    """
    Raises:
        ConfigError: as `Certificate`.
    """
    if bind.tls_certificate is None or bind.tls_key is None:
        return None
    return Certificate(Path(bind.tls_certificate), Path(bind.tls_key))


def check(certificate: Path, key: Path) -> datetime:
    """Check the two files. Returns when the first certificate of the chain ends.

    Raises:
        ConfigError: as `Certificate`.
    """
    chain, content = _certificates(certificate), _read(KEY, key)
    mode = stat.S_IMODE(key.stat().st_mode)
    if mode & OPEN_TO_OTHERS:
        raise ConfigError(f"{KEY}: {key}: has mode {mode:04o}, so others can use it; wanted 0600 (chmod 600)")
    try:
        private = load_pem_private_key(content, None)
    except TypeError:
        raise ConfigError(
            f"{KEY}: {key}: is encrypted; wanted a key without a passphrase, in a file of mode 0600 "
            "(openssl pkey -in ENCRYPTED -out PLAIN)"
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        swapped = "; it holds a certificate: are the two files swapped?" if b"BEGIN CERTIFICATE" in content else ""
        raise ConfigError(f"{KEY}: {key}: found no PEM private key{swapped}") from None
    fits = [each.public_key() == private.public_key() for each in chain]
    if not any(fits):
        raise ConfigError(f"{KEY}: {key}: does not fit the certificate {certificate}: it is the key of another one")
    if not fits[0]:
        raise ConfigError(
            f"{CERTIFICATE}: {certificate}: the server's certificate is number {fits.index(True) + 1} of "
            f"{len(chain)}; wanted it first, then each one's issuer"
        )
    _refuse_order(certificate, chain)
    _refuse_dates(certificate, chain)
    return chain[0].not_valid_after_utc


def _certificates(path: Path) -> list[x509.Certificate]:
    content = _read(CERTIFICATE, path)
    try:
        return x509.load_pem_x509_certificates(content)
    except ValueError:
        swapped = "; it holds a private key: are the two files swapped?" if b"PRIVATE KEY" in content else ""
        raise ConfigError(f"{CERTIFICATE}: {path}: found no PEM certificate{swapped}") from None


def _refuse_order(path: Path, chain: list[x509.Certificate]) -> None:
    for at, each in enumerate(chain[:-1]):
        issuers = [n for n, other in enumerate(chain) if n != at and other.subject == each.issuer]
        if issuers and at + 1 not in issuers:
            raise ConfigError(
                f"{CERTIFICATE}: {path}: the issuer of certificate {at + 1} is number {issuers[0] + 1}; wanted it "
                f"as number {at + 2}: the server's certificate first, then each one's issuer"
            )


def _refuse_dates(path: Path, chain: list[x509.Certificate]) -> None:
    now = datetime.now(UTC)
    for number, each in enumerate(chain, start=1):
        if each.not_valid_after_utc < now:
            raise ConfigError(
                f"{CERTIFICATE}: {path}: certificate {number} expired on {each.not_valid_after_utc:%Y-%m-%d %H:%M} "
                "UTC; wanted one that is valid: clients would refuse the connection"
            )
        if each.not_valid_before_utc > now:
            raise ConfigError(
                f"{CERTIFICATE}: {path}: certificate {number} is not valid before "
                f"{each.not_valid_before_utc:%Y-%m-%d %H:%M} UTC; wanted one that is, or this machine's clock is wrong"
            )


def _read(name: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{name}: {path}: cannot be read: {error.strerror}") from None
