"""Reads files that a user names; an error is one line with file and place.

A library's exception adds only its first line, after the file's name.
"""

from __future__ import annotations

import codecs
import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rlsys.errors import ConfigError

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_PLAIN = re.compile(r"[\w./ @=,+-]*")
LFS_POINTER = b"version https://git-lfs"


def read_text(path: Path, where: str) -> str:
    """Text of a file that a user names, without a byte-order mark. `where`: the start of error messages.

    Raises:
        ConfigError: it cannot be read, or is not UTF-8.
    """
    return decode(read_bytes(path, where), where)


def why_undecodable(paths: Iterable[Path]) -> str:
    """The error of the first file that is not UTF-8 or no JSON, for libraries that do not name it; "" without one."""
    for path in paths:
        try:
            text = read_text(path, str(path))
            if path.suffix == ".json":
                json.loads(text)
        except ConfigError as error:
            return str(error)
        except json.JSONDecodeError as error:
            return f"{path}, line {error.lineno}: is no JSON: {error.msg}, column {error.colno}"
    return ""


def read_bytes(path: Path, where: str) -> bytes:
    """Content of a file that a user names.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{where} cannot be read: {first_line(error)}") from error


def decode(content: bytes, where: str, first_line: int = 1) -> str:
    """Decode UTF-8, without a byte-order mark. `first_line`: the number of the content's first line in its file.

    Raises:
        ConfigError: it is not UTF-8; with line and column of the first wrong byte.
    """
    try:
        return content.decode("utf-8-sig" if first_line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        before = content[: error.start]
        line, column = first_line + before.count(b"\n"), error.start - (before.rfind(b"\n") + 1) + 1
        kind = "UTF-16" if first_line == 1 and content.startswith(_UTF16) else f"byte 0x{content[error.start]:02x}"
        raise ConfigError(
            f"{where}, line {line}: found {kind} at byte {column} of the line; wanted UTF-8: save the file in that "
            "encoding, such as with `iconv -f ENCODING -t UTF-8`"
        ) from None


@contextmanager
def plain_path(folder: Path) -> Iterator[Path]:
    """The folder under a plain name until the block ends, for libraries that read a path as a pattern or an address.

    A path with special characters, such as exp[1], a*b or a::b, is replaced by a symbolic link.
    """
    if _PLAIN.fullmatch(str(folder)):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="rlsys-link-") as place:
        link = Path(place) / "folder"
        link.symlink_to(folder.resolve())
        yield link


def first_line(error: BaseException) -> str:
    """First line of an error's message; its type if the message is empty."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    line = next((line.strip() for line in said.splitlines() if line.strip()), "")
    return line or f"{type(error).__name__} without a message"
