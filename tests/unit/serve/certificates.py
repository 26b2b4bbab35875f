"""Certificates for tests of TLS: an authority, an issuer below it, and a server's."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import NameOID


@dataclass(frozen=True)
class Issued:
    """A certificate and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    def key_pem(self, passphrase: bytes | None = None) -> bytes:
        protection = NoEncryption() if passphrase is None else BestAvailableEncryption(passphrase)
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, protection)


def issue(name: str, issuer: Issued | None = None, *, starts: float = -1, ends: float = 30) -> Issued:
    """A certificate that is valid from `starts` to `ends` days from now; without an issuer an authority's own."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    addresses = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    built = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if issuer is None else issuer.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(days=starts))
        .not_valid_after(now + timedelta(days=ends))
        .add_extension(x509.BasicConstraints(ca=not name.startswith("server"), path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(addresses), critical=False)
        .sign(key if issuer is None else issuer.key, hashes.SHA256())
    )
    return Issued(built, key)


def write(folder: Path, certificate: bytes, key: bytes, mode: int = 0o600) -> tuple[Path, Path]:
    files = folder / "tls.crt", folder / "tls.key"
    for file, content in zip(files, (certificate, key), strict=True):
        new = file.with_suffix(file.suffix + ".new")
        new.write_bytes(content)
        new.chmod(mode)
        new.replace(file)  # as those who renew certificates do
    return files
