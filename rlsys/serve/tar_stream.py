"""A folder's files as a tar archive, sent as it is read: no copy on the server's disk."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

PART = 2**20


class TarStream:
    """Plain files of a folder, opened at once: the archive stays complete if the folder is deleted meanwhile.

    Raises:
        OSError: the folder or a file cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._open = ExitStack()
        self._files: list[tuple[bytes, BinaryIO, int]] = []
        try:
            for path in sorted(folder.iterdir()):
                if path.is_file() and not path.is_symlink():
                    file = self._open.enter_context(path.open("rb"))
                    size = os.fstat(file.fileno()).st_size
                    self._files.append((_header(path.name, size, file), file, size))
        except BaseException:
            self.close()
            raise

    @property
    def nbytes(self) -> int:
        return sum(len(header) + size + _padding(size) for header, _, size in self._files) + 2 * tarfile.BLOCKSIZE

    def parts(self) -> Iterator[bytes]:
        with self._open:
            for header, file, size in self._files:
                yield header
                rest = size
                while rest:
                    part = file.read(min(PART, rest))
                    if not part:
                        raise OSError(f"{file.name}: became shorter while it was sent")
                    rest -= len(part)
                    yield part
                yield bytes(_padding(size))
            yield bytes(2 * tarfile.BLOCKSIZE)

    def close(self) -> None:
        self._open.close()


def _header(name: str, size: int, file: BinaryIO) -> bytes:
    """Without names and numbers of this machine's users."""
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = size, int(os.fstat(file.fileno()).st_mtime), 0o644
    return info.tobuf()


def _padding(size: int) -> int:
    return -size % tarfile.BLOCKSIZE
