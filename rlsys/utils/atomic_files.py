"""Files and folders that are the old or the new content, whole and on the disk, whenever the writer dies."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath

# what a disk answers that is full, over quota, read-only or broken; a file that grew beyond `ulimit -f`
REFUSALS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.EACCES, errno.EPERM})


def refusal(error: OSError, folder: Path) -> str | None:
    """A disk's refusal in one line; None where the error is no disk's. `folder`: where it was, unless it says so."""
    if error.errno not in REFUSALS:
        return None
    room = {errno.ENOSPC, errno.EDQUOT}
    help_ = "make room, or choose another place" if error.errno in room else "choose a place that can be written"
    return f"{error.filename or folder}: cannot be written: {error.strerror}; {help_} (run.dir)"


def replace_file(path: Path, content: bytes) -> None:
    """Until it is done, the new content lies beside `path` as ``.<name>.new``."""
    temporary = path.with_name(f".{path.name}.new")
    with open(temporary, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def replace_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """`path` holds these files by their relative names, and no others.

    Until it is done, the new folder lies beside `path` as ``.<name>.<random>`` and, for a moment, the old one as
    ``.<name>.old``, which is the only one of both if the writer dies in that moment.
    """
    assert all(map(is_plain, files)), f"a name leaves its folder: {sorted(files)}"
    path.parent.mkdir(parents=True, exist_ok=True)
    new, old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent)), path.with_name(f".{path.name}.old")
    try:
        folders = {new}
        for name, content in files.items():
            target = new / name
            target.parent.mkdir(parents=True, exist_ok=True)
            folders.add(target.parent)
            with open(target, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
        for folder in folders:
            sync_folder(folder)
        new.chmod(0o755)  # mkdtemp's 0700 would hide it from other users
        remove(old)
        if os.path.lexists(path):
            os.rename(path, old)
        os.rename(new, path)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    sync_folder(path.parent)
    with suppress(OSError):
        remove(old)


def remove(path: Path) -> None:
    """A file, or a folder with all that is in it. Of a symbolic link the link alone: what it points to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_folder(path: Path) -> None:
    """It vanishes at once, and is taken apart afterwards."""
    if path.is_symlink():
        path.unlink()
        return
    gone = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    os.rename(path, gone)
    shutil.rmtree(gone, ignore_errors=True)


def is_plain(name: str) -> bool:
    """A relative name that stays within its folder."""
    pure = PurePosixPath(name)
    return str(pure) == name and not pure.is_absolute() and ".." not in pure.parts


def sync_folder(folder: Path) -> None:
    """Names that were made or moved in it outlive the machine."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
