"""The bytes of a manifest are those of files that exist already: checkpoints written before stay readable."""

from __future__ import annotations

import json

from rlsys.utils.manifest import digest, file_entry, sealed, to_json

BODY = {"format": "rlsys-resume", "step": 3, "files": {"b": file_entry(b"two"), "a": file_entry(b"")}}


def test_a_file_is_stated_by_its_size_and_its_blake2b_of_16_bytes() -> None:
    assert file_entry(b"weights") == {"bytes": 7, "blake2b": "873ac3c6df553eaa62331fd4ff9b521a"}


def test_the_hash_of_a_manifest_does_not_depend_on_the_order_of_its_keys() -> None:
    assert digest(BODY) == digest(dict(reversed(BODY.items()))) == "a7abcb0c4d04a953b9d140fda65ff8e9"
    assert digest({**BODY, "step": 4}) != digest(BODY)


def test_a_sealed_manifest_keeps_its_order_and_ends_with_its_hash_and_a_newline() -> None:
    content = sealed(BODY)
    assert content == to_json({**BODY, "digest": digest(BODY)})
    assert content.endswith(f'"digest": "{digest(BODY)}"\n}}\n'.encode())
    assert list(json.loads(content)) == ["format", "step", "files", "digest"]
    assert b'\n  "step": 3,\n' in content
