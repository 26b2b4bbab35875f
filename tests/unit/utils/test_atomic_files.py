"""A file or folder has all of its old or all of its new content, wherever the writer stops."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from rlsys.utils.atomic_files import new_folder, remove, replace_file, replace_folder

ROOT = Path(__file__).parents[3]


def content(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_replaced_folder_holds_the_new_files_and_no_others(tmp_path: Path) -> None:
    target = tmp_path / "a" / "folder"
    replace_folder(target, {"x": b"1", "in/y": b"2"})
    replace_folder(target, {"z": b"3"})
    assert content(target) == {"z": "3"}
    assert [path.name for path in target.parent.iterdir()] == ["folder"]
    assert stat.S_IMODE(target.stat().st_mode) == 0o755


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x"])
def test_a_name_that_leaves_the_folder_is_not_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(AssertionError, match="leaves its folder"):
        replace_folder(tmp_path / "folder", {name: b""})
    assert list(tmp_path.iterdir()) == []


def test_a_new_folder_does_not_replace_one_with_content(tmp_path: Path) -> None:
    replace_folder(tmp_path / "folder", {"old": b"1"})
    with pytest.raises(FileExistsError, match="is already there"), new_folder(tmp_path / "folder") as folder:
        (folder / "new").write_text("2")
    assert content(tmp_path) == {"folder/old": "1"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_block_that_fails_leaves_what_was_there(tmp_path: Path, overwrite: bool) -> None:
    if overwrite:
        replace_folder(tmp_path / "folder", {"old": b"1"})
    before = content(tmp_path)

    def fail() -> None:
        with new_folder(tmp_path / "folder", overwrite) as folder:
            (folder / "new").write_text("2")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert content(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == (["folder"] if overwrite else [])


def test_a_rename_that_fails_restores_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_folder(tmp_path / "folder", {"old": b"1"})
    real, calls = os.rename, []

    def second_fails(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError("no space left")
        real(source, target)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(OSError, match="no space left"):
        replace_folder(tmp_path / "folder", {"new": b"2"})
    assert content(tmp_path) == {"folder/old": "1"}


def test_files_and_inner_folders_are_on_disk_before_the_name_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, os.rename

    def seen_fsync(handle: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def seen_rename(source: Path, target: Path) -> None:
        events.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "rename", seen_rename)
    replace_folder(tmp_path / "folder", {"in/y": b"2", "x": b"1"})
    at = events.index("rename")
    assert sorted(events[: at - 1]) == ["in", "x", "y"] and events.index("y") < events.index("in")
    assert events[at - 1].startswith(".folder.")
    assert events[at + 1 :] == [tmp_path.name]


def test_a_file_is_the_old_or_the_new_content_when_its_writer_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    replace_file(path, b"0" * 100_000)
    code = (
        "from pathlib import Path; from rlsys.utils.atomic_files import replace_file\n"
        "print(flush=True)\n"
        f"for i in range(10**6): replace_file(Path({str(path)!r}), bytes([48 + i % 10]) * 100_000)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    assert writer.stdout is not None
    writer.stdout.readline()
    for _ in range(20):
        found = path.read_bytes()
        assert len(found) == 100_000 and len(set(found)) == 1
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    found = path.read_bytes()
    assert len(found) == 100_000 and len(set(found)) == 1


def test_a_link_is_removed_and_not_what_it_points_to(tmp_path: Path) -> None:
    replace_folder(tmp_path / "there", {"x": b"1"})
    (tmp_path / "link").symlink_to(tmp_path / "there")
    remove(tmp_path / "link")
    assert content(tmp_path) == {"there/x": "1"}
