"""Manifests: size and hash of each file of a folder, sealed with a hash of the manifest itself.

Hashes are BLAKE2b with 16 bytes, over a file's bytes or over the manifest's JSON with sorted keys.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping


def file_entry(content: bytes) -> dict[str, int | str]:
    """What a manifest says about one file."""
    return {"bytes": len(content), "blake2b": hashlib.blake2b(content, digest_size=16).hexdigest()}


def digest(body: Mapping[str, object]) -> str:
    """Hash of a manifest without its own ``digest`` entry."""
    return hashlib.blake2b(json.dumps(body, sort_keys=True).encode(), digest_size=16).hexdigest()


def sealed(body: Mapping[str, object]) -> bytes:
    """The manifest's file: `body` and its ``digest``."""
    return to_json({**body, "digest": digest(body)})


def to_json(value: Mapping[str, object]) -> bytes:
    """Indented JSON that ends with a newline."""
    return (json.dumps(value, indent=2) + "\n").encode()
