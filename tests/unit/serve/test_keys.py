"""API keys: whom they belong to, and what never happens to them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from rlsys.errors import ConfigError
from rlsys.serve.keys import KeyFile, NoKeys, create_key_file


def written(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def test_a_new_key_file_is_its_owners_alone_and_has_a_key_that_clients_accept(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "keys"
    os.umask(0)
    create_key_file(path)
    key, tenant = path.read_text().split()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and key.startswith("tml-") and len(key) == 52
    assert KeyFile(path).tenant(key) == tenant == "local"
    with pytest.raises(FileExistsError):
        create_key_file(path)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o620, 0o602, 0o777])
def test_a_file_that_others_can_use_is_refused(mode: int, tmp_path: Path) -> None:
    path = written(tmp_path / "keys", "tml-secret one\n", mode)
    with pytest.raises(ConfigError, match=f"has mode {mode:04o}, so others can read it; wanted 0600") as refused:
        KeyFile(path)
    assert "tml-secret" not in str(refused.value)


def test_several_keys_of_several_tenants_and_comments(tmp_path: Path) -> None:
    keys = KeyFile(written(tmp_path / "keys", "# first\ntml-aaaa one\n\ntml-bbbb one\nsk-cccccc two\n"))
    assert [keys.tenant(key) for key in ("tml-aaaa", "tml-bbbb", "sk-cccccc")] == ["one", "one", "two"]
    assert [keys.tenant(key) for key in ("", "tml-aaa", "tml-aaaaa", "TML-AAAA", "one", "# first", "\udcff", "é")] == [
        None
    ] * 8
    assert keys.tenants == ["one", "two"]


def test_a_changed_file_takes_effect_without_a_restart(tmp_path: Path) -> None:
    path = written(tmp_path / "keys", "tml-aaaa one\n")
    keys = KeyFile(path)
    written(path, "tml-bbbb one\ntml-cccc two\n")
    assert (keys.tenant("tml-aaaa"), keys.tenant("tml-bbbb"), keys.tenant("tml-cccc")) == (None, "one", "two")


@pytest.mark.parametrize(
    "text",
    ["", "# none\n", "tml-secret\n", "tml-secret one two\n", "tml-secret ../x\n", "short a\n", "tml-secret a/b\n"],
)
def test_a_damaged_file_is_refused_without_showing_a_key(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="keys: ") as refused:
        KeyFile(written(tmp_path / "keys", text))
    assert "tml-secret" not in str(refused.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        KeyFile(tmp_path / "none")


def test_no_key_in_memory_is_readable(tmp_path: Path) -> None:
    keys = KeyFile(written(tmp_path / "keys", "tml-aaaa one\n"))
    keys.tenant("tml-aaaa")
    assert "tml-aaaa" not in repr(vars(keys))


def test_without_keys_any_key_is_one_tenant_and_none_is_nobody() -> None:
    assert (NoKeys().tenant("x"), NoKeys().tenant("")) == ("local", None)
