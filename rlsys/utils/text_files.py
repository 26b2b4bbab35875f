"""Files that a user names: what cannot be read or decoded is one line, with file and place.

Library exceptions are for programmers; their first line goes into a message only behind what was read.
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
    """The text of a file that a user names, without a byte-order mark. `where`: what messages begin with.

    Raises:
        ConfigError: it cannot be read, or is not UTF-8.
    """
    return decode(read_bytes(path, where), where)


def why_undecodable(paths: Iterable[Path]) -> str:
    """Which of some texts is not UTF-8 or no JSON, where a library said only that it cannot read one; "" of none."""
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
    """The content of a file that a user names.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{where} cannot be read: {first_line(error)}") from error


def decode(content: bytes, where: str, first_line: int = 1) -> str:
    """UTF-8 to text, without a byte-order mark. `first_line`: the number of the content's first line in its file.

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
    """The folder, for libraries that take a path for a pattern or an address; until the block ends.

    A link with a plain name where the path has signs that mean something to them: exp[1], a*b, a::b.
    """
    if _PLAIN.fullmatch(str(folder)):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="rlsys-link-") as place:
        link = Path(place) / "folder"
        link.symlink_to(folder.resolve())
        yield link


def first_line(error: BaseException) -> str:
    """What an error says, in one line; of an error that says nothing, its kind."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    line = next((line.strip() for line in said.splitlines() if line.strip()), "")
    return line or f"{type(error).__name__}, which says nothing"
