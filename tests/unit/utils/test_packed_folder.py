"""Claims about a folder that is packed to bytes and unpacked on another node."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rlsys.errors import CheckpointError
from rlsys.utils.atomic_files import new_folder
from rlsys.utils.packed_folder import MANIFEST, pack_folder, unpack_folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    (folder / "sub").mkdir(parents=True)
    (folder / "weights.bin").write_bytes(bytes(range(256)))
    (folder / "sub" / "note.txt").write_text("hello")
    return folder


def test_a_folder_travels_whole(source: Path, tmp_path: Path) -> None:
    unpack_folder(pack_folder(source), tmp_path / "there")
    assert (tmp_path / "there" / "weights.bin").read_bytes() == bytes(range(256))
    assert pack_folder(tmp_path / "there") == pack_folder(source)


def test_files_behind_links_are_packed_as_their_content(source: Path) -> None:
    (source / "link.bin").symlink_to(source / "weights.bin")  # the hub cache is made of such links
    assert pack_folder(source)["link.bin"] == bytes(range(256))


def test_many_unpacking_at_once_leave_one_whole_folder_and_no_rubbish(source: Path, tmp_path: Path) -> None:
    files, target = pack_folder(source), tmp_path / "node" / "base"
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda _: unpack_folder(files, target), range(64)))
    assert pack_folder(target) == files
    assert list(target.parent.iterdir()) == [target]


def test_a_folder_that_appears_meanwhile_is_kept_and_the_late_comer_told(tmp_path: Path) -> None:
    def late() -> None:
        with new_folder(tmp_path / "base"):
            (tmp_path / "base").mkdir()
            (tmp_path / "base" / "first").write_text("x")

    with pytest.raises(FileExistsError):
        late()
    assert [path.name for path in tmp_path.rglob("*")] == ["base", "first"]


def test_a_late_unpacking_accepts_the_equal_folder_that_won_the_race(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, there = pack_folder(source), tmp_path / "there"
    unpack_folder(files, there)
    seen = iter([False])  # as if the winner's rename came right after the look
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: next(seen, None) is None and exists(path))
    unpack_folder(files, there)
    assert pack_folder(there) == files


def test_content_that_changed_on_the_way_is_refused_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    files = pack_folder(source)
    for damaged in (
        {**files, "weights.bin": b"other"},
        {**files, "extra.bin": b""},
        {name: content for name, content in files.items() if name != "weights.bin"},
        {name: content for name, content in files.items() if name != MANIFEST},
    ):
        with pytest.raises(CheckpointError, match="manifest"):
            unpack_folder(damaged, tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_a_folder_with_other_content_is_refused_and_kept(source: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    unpack_folder(pack_folder(source), there)
    (there / "weights.bin").write_bytes(b"mine")
    with pytest.raises(CheckpointError, match="other content"):
        unpack_folder(pack_folder(source), there)
    assert (there / "weights.bin").read_bytes() == b"mine"


@pytest.mark.parametrize(
    "name", ["../evil", "/etc/evil", "a/../../evil", "a//b", "./a", "..", ".", "", "a\\b", "a\nb", "a/"]
)
def test_a_name_that_leaves_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="leaves the folder"):
        unpack_folder({name: b"x"}, tmp_path / "in" / "there")
    assert not (tmp_path / "in").exists()


def test_an_empty_or_missing_folder_cannot_be_packed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="empty"):
        pack_folder(tmp_path)
    with pytest.raises(CheckpointError, match="not a folder"):
        pack_folder(tmp_path / "none")


def test_a_folder_whose_making_fails_never_appears(tmp_path: Path) -> None:
    def fail() -> None:
        with new_folder(tmp_path / "base") as folder:
            (folder / "half").write_text("x")
            raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"):
        fail()
    assert list(tmp_path.iterdir()) == []
