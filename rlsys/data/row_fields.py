"""From a value of a row to what a problem is made of: a text, or the messages of a conversation.

A column is a name of the row, or a path into what a column holds: ``reward_model.ground_truth``, ``answers.text.0``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, time
from decimal import Decimal
from typing import Any

from rlsys.data.messages import Messages, why_not_messages
from rlsys.data.row_files import number

MISSING = object()  # what a row has at a column that it lacks
_LARGEST_EXPONENT = 30  # digits before or behind the point that are written out
_SHOWN = 80  # characters of a value in a message


class UnusableError(Exception):
    """A value that is nothing to ask or to compare with; the message says what it is."""


def roots(column: str) -> tuple[str, ...]:
    """The names of columns that may hold it: a.b.c -> a.b.c, a.b, a."""
    parts = column.split(".")
    return tuple(".".join(parts[:end]) for end in range(len(parts), 0, -1))


def at(row: Mapping[str, Any], column: str) -> Any:
    """The value there; MISSING where the row has no such column, None where what should hold it is missing."""
    for root in roots(column):
        if root in row:
            return _inside(row[root], column[len(root) + 1 :].split(".") if root != column else [])
    return MISSING


def names(row: Mapping[str, Any]) -> Iterator[str]:
    """Of all that ``at`` finds in a row, elements of lists apart."""
    for name, value in row.items():
        if isinstance(value, Mapping) and value:
            yield from (f"{name}.{inner}" for inner in names(value))
        else:
            yield name


def text(value: object, wanted: str = "a text or a number") -> str:
    """Texts as they are, numbers and days as one writes them.

    Raises:
        UnusableError: it is missing, or blank, or something else.
    """
    written = _written(value)
    if written is None or not written.strip():
        hint = ""
        if isinstance(value, Mapping) and value:
            hint = f"; name what it holds in task.columns, such as COLUMN.{next(iter(value))}"
        raise UnusableError(f"is {type(value).__name__} {str(value)[:_SHOWN]!r}, wanted {wanted}{hint}")
    try:
        written.encode()
    except UnicodeEncodeError as error:
        half = ascii(written[error.start])[1:-1]
        raise UnusableError(f"has half a character ({half}) at {error.start}, wanted a whole text") from None
    return written


def question(value: object) -> str | Messages:
    """A text, or messages if they are more than one of the user.

    Raises:
        UnusableError: it is neither.
    """
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        return text(value)
    wanted = "a text or a number, or messages of role and content"
    if not value or not all(isinstance(message, Mapping) and {"role", "content"} <= {*message} for message in value):
        raise UnusableError(f"is {type(value).__name__} {str(value)[:_SHOWN]!r}, wanted {wanted}")
    messages = tuple((_role(message["role"]), _content(message["content"])) for message in value)
    why = why_not_messages(messages)
    if why:
        raise UnusableError(f"{why}, wanted {wanted}")
    return messages[0][1] if len(messages) == 1 else messages


def _inside(value: Any, path: Sequence[str]) -> Any:
    for part in path:
        if value is None:
            return None
        if isinstance(value, Mapping):
            value = value.get(part, MISSING)
        elif isinstance(value, list) and part.isdigit():
            value = value[int(part)] if int(part) < len(value) else None
        else:
            return MISSING
        if value is MISSING:
            return MISSING
    return value


def _written(value: object) -> str | None:
    if isinstance(value, float):
        value = number(repr(value)) if math.isfinite(value) else None
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return None
    if isinstance(value, date | time):  # a datetime is a date too
        return value.isoformat()
    if isinstance(value, bool) or not isinstance(value, int | Decimal):
        return None
    if isinstance(value, int):
        return str(value)
    return _decimal(value) if value.is_finite() else None


def _decimal(value: Decimal) -> str:
    exponent = value.as_tuple().exponent
    assert isinstance(exponent, int)
    if exponent > _LARGEST_EXPONENT or value.adjusted() < -_LARGEST_EXPONENT:
        return str(value)
    return format(value, "f")


def _role(role: object) -> str:
    return role if isinstance(role, str) else repr(role)


def _content(content: object) -> str:
    """A text, or the texts of its parts, as those who also have images write it."""
    if content == "":
        return ""  # such as a system prompt that is meant to be empty
    if not isinstance(content, list):
        return text(content, "a text")
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise UnusableError(f"has a message with a part of type {kind!r}, wanted texts alone")
    return "".join(text(part.get("text"), "a text") for part in content)
