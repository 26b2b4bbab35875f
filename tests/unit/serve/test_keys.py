"""API keys: whom they belong to, and what never happens to them."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from rlsys.errors import ConfigError
from rlsys.serve.keys import KeyFile, NoKeys, create_key_file, hashed_line, new_key, read_keys


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


def damage(path: Path, how: str) -> None:
    match how:
        case "a wrong line":
            written(path, "tml-aaaa one\ntml-bbbb\n")
        case "empty":
            written(path, "")
        case "no UTF-8":
            path.write_bytes(b"\xff\xfe one\n")
        case "open to others":
            path.chmod(0o644)
        case _:
            path.unlink()


@pytest.mark.parametrize("how", ["a wrong line", "empty", "no UTF-8", "open to others", "gone"])
def test_a_file_that_becomes_wrong_leaves_the_keys_before_in_force_and_is_logged_once(
    how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = written(tmp_path / "keys", "tml-aaaa one\n")
    keys = KeyFile(path)
    damage(path, how)
    assert [keys.tenant(key) for key in ("tml-aaaa", "tml-bbbb", "")] == ["one", None, None]
    assert len(caplog.records) == 1 and "the keys before stay in force: keys: " in caplog.text
    assert "tml-" not in caplog.text
    path.unlink(missing_ok=True)
    written(path, "tml-cccc two\n")
    assert [keys.tenant(key) for key in ("tml-aaaa", "tml-cccc")] == [None, "two"]


def test_a_line_may_hold_a_hash_in_place_of_the_key(tmp_path: Path) -> None:
    key = new_key()
    line = hashed_line(key, "one")
    assert key not in line and line.startswith("sha256:") and line.endswith(" one")
    keys = KeyFile(written(tmp_path / "keys", f"{line}\ntml-aaaa two\n"))
    assert [keys.tenant(each) for each in (key, "tml-aaaa", line.split()[0], line[7:71])] == ["one", "two", None, None]


@pytest.mark.parametrize("word", ["sha256:", "sha256:" + "a" * 63, "sha256:" + "A" * 64, "sha256:" + "g" * 64])
def test_a_hash_that_is_none_is_refused_and_not_taken_for_a_key(word: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="line 1: wanted `key tenant`"):
        KeyFile(written(tmp_path / "keys", f"{word} one\n"))


def test_a_key_belongs_to_one_tenant(tmp_path: Path) -> None:
    twice = f"tml-aaaa one\n{hashed_line('tml-aaaa', 'one')}\n"
    assert KeyFile(written(tmp_path / "keys", twice)).tenant("tml-aaaa") == "one"
    with pytest.raises(ConfigError, match="line 3: this key is another tenant's already") as refused:
        KeyFile(written(tmp_path / "keys", twice + "tml-aaaa two\n"))
    assert "tml-" not in str(refused.value)


def test_keys_of_a_variable_leave_the_environment() -> None:
    variables = {"SERVE": "tml-aaaa one; tml-bbbb two\n# none\n", "OTHER": "x"}
    keys = read_keys("env:SERVE", variables)
    assert [keys.tenant(key) for key in ("tml-aaaa", "tml-bbbb", "tml-cccc")] == ["one", "two", None]
    assert variables == {"OTHER": "x"}
    with pytest.raises(ConfigError, match="the environment variable SERVE is not set"):
        read_keys("env:SERVE", variables)
    for wrong in ("", "tml-secret", "tml-secret one two"):
        with pytest.raises(ConfigError, match="keys: the environment variable SERVE: ") as refused:
            read_keys("env:SERVE", {"SERVE": wrong})
        assert "tml-secret" not in str(refused.value)


def test_the_command_makes_a_line_and_shows_the_key_apart(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rlsys", "serve-key", "alice"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    key = done.stderr.removeprefix("key of alice: ").strip()
    assert KeyFile(written(tmp_path / "keys", done.stdout)).tenant(key) == "alice" and key not in done.stdout
    again = subprocess.run(
        [*command, "--stdin"], input=f"{key}\n", capture_output=True, text=True, timeout=300, check=True
    )
    assert (again.stdout, again.stderr) == (done.stdout, "")
    wrong = subprocess.run(
        [*command, "--stdin"], input="short\n", capture_output=True, text=True, timeout=300, check=False
    )
    assert wrong.returncode == 1 and "short" not in wrong.stderr and wrong.stderr.startswith("ConfigError: keys: ")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        KeyFile(tmp_path / "none")


def test_no_key_in_memory_is_readable(tmp_path: Path) -> None:
    keys = KeyFile(written(tmp_path / "keys", "tml-aaaa one\n"))
    keys.tenant("tml-aaaa")
    assert "tml-aaaa" not in repr(vars(keys))


def test_without_keys_any_key_is_one_tenant_and_none_is_nobody() -> None:
    assert (NoKeys().tenant("x"), NoKeys().tenant("")) == ("local", None)
