"""Atomic replacement of files and folders: a name has all of its old or all of its new content, also after a crash."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

# errors of a disk that is full, over quota, read-only or broken, and of a file beyond `ulimit -f`
REFUSALS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.EACCES, errno.EPERM})


def refusal(error: OSError, folder: Path) -> str | None:
    """One line about a disk that refuses to write; None for other errors. `folder`: where the error names no file."""
    if error.errno not in REFUSALS:
        return None
    room = {errno.ENOSPC, errno.EDQUOT}
    help_ = "make room, or choose another place" if error.errno in room else "choose a place that can be written"
    return f"{error.filename or folder}: cannot be written: {error.strerror}; {help_} (run.dir)"


def replace_file(path: Path, content: bytes) -> None:
    """Replace the content of a file. Until that is done, the new content is beside `path` as ``.<name>.new``."""
    temporary = path.with_name(f".{path.name}.new")
    with open(temporary, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


@contextmanager
def new_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that becomes `path` when the block ends without an error.

    Until then the folder is ``.<name>.<random>``. With `overwrite` an existing `path` becomes ``.<name>.old`` for a
    moment, then vanishes; a writer that dies in that moment leaves only ``.<name>.old``. Files and folders are on disk
    before `path` appears.

    Raises:
        FileExistsError: `path` appeared meanwhile and holds something; without `overwrite`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new, old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent)), path.with_name(f".{path.name}.old")
    try:
        yield new
        _sync_tree(new)
        new.chmod(0o755)  # mkdtemp's 0700 would hide it from other users
        if overwrite:
            _rename_over(new, path, old)
        else:
            _rename_to_free_name(new, path)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    sync_folder(path.parent)
    if overwrite:
        with suppress(OSError):
            remove(old)


def replace_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Make the folder `path` hold these files, by their relative names, and no others; as ``new_folder``."""
    assert all(map(is_plain, files)), f"a name leaves its folder: {sorted(files)}"
    with new_folder(path, overwrite=True) as folder:
        for name, content in files.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)


def remove(path: Path) -> None:
    """Remove a file, or a folder with its content. Of a symbolic link only the link is removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_folder(path: Path) -> None:
    """Remove a folder: its name disappears first and at once, its content afterwards."""
    if path.is_symlink():
        path.unlink()
        return
    gone = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        os.rename(path, gone)
    finally:  # also without the folder, if `path` vanished meanwhile
        shutil.rmtree(gone, ignore_errors=True)


def is_plain(name: str) -> bool:
    """Whether the name is relative and stays within its folder."""
    pure = PurePosixPath(name)
    return str(pure) == name and not pure.is_absolute() and ".." not in pure.parts


def sync_folder(folder: Path) -> None:
    """Write the folder's names to disk: files created or renamed in it survive a crash of the machine."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_tree(folder: Path) -> None:
    """Every file, then every folder, this one last."""
    entries = sorted(folder.rglob("*"), key=lambda path: len(path.parts), reverse=True)
    for file in (path for path in entries if path.is_file() and not path.is_symlink()):
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())
    for inner in (path for path in entries if path.is_dir() and not path.is_symlink()):
        sync_folder(inner)
    sync_folder(folder)


def _rename_over(new: Path, path: Path, old: Path) -> None:
    remove(old)
    if os.path.lexists(path):
        os.rename(path, old)
    try:
        os.rename(new, path)
    except BaseException:
        if os.path.lexists(old) and not os.path.lexists(path):
            os.rename(old, path)
        raise


def _rename_to_free_name(new: Path, path: Path) -> None:
    try:
        os.rename(new, path)  # replaces an empty folder, never one with content
    except OSError as error:
        if path.exists():
            raise FileExistsError(f"{path} is already there") from error
        raise
