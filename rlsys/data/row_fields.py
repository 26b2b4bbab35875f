"""Converts the cells of a row to text or to messages.

A column in a job is a column name, or a path into a nested column: ``reward_model.ground_truth``, ``answers.text.0``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, time
from decimal import Decimal

from rlsys.data.messages import Messages, why_not_messages
from rlsys.data.row_files import Row, number

MISSING = object()  # value of a column that a row does not have
_MAX_WRITTEN_DIGITS = 30  # before or after the decimal point; longer decimals keep their exponent
_MESSAGE_CHARS = 80  # characters of a value in an error message


class UnusableError(Exception):
    """A value is neither usable text nor usable messages; the error message describes the value."""


def roots(column: str) -> tuple[str, ...]:
    """Return the names of top-level columns that may contain `column`: a.b.c -> a.b.c, a.b, a."""
    parts = column.split(".")
    return tuple(".".join(parts[:end]) for end in range(len(parts), 0, -1))


def value_at(row: Row, column: str) -> object:
    """Return the value of a column; MISSING if the row has no such column, None if a value on its path is missing."""
    for root in roots(column):
        if root in row:
            return _inside(row[root], column[len(root) + 1 :].split(".") if root != column else [])
    return MISSING


def names(row: Row) -> Iterator[str]:
    """Yield the column names and paths of a row that ``value_at`` accepts, without paths into lists."""
    for name, value in row.items():
        if isinstance(value, Mapping) and value:
            yield from (f"{name}.{inner}" for inner in names(value))
        else:
            yield name


def text(value: object, wanted: str = "a text or a number") -> str:
    """Return the value as text: strings unchanged, numbers in decimal notation, dates and times in ISO 8601.

    Raises:
        UnusableError: the value is missing, blank or of another type.
    """
    as_text = _as_text(value)
    if as_text is None or not as_text.strip():
        hint = ""
        if isinstance(value, Mapping) and value:
            hint = f"; name one of its fields in task.columns, such as COLUMN.{next(iter(value))}"
        raise UnusableError(f"is {type(value).__name__} {str(value)[:_MESSAGE_CHARS]!r}, wanted {wanted}{hint}")
    try:
        as_text.encode()
    except UnicodeEncodeError as error:
        surrogate = ascii(as_text[error.start])[1:-1]
        raise UnusableError(
            f"has an unpaired surrogate ({surrogate}) at character {error.start}, wanted text that can be encoded as "
            "UTF-8"
        ) from None
    return as_text


def question(value: object) -> str | Messages:
    """Return the value as a question, or as messages; a single user message is a question.

    Raises:
        UnusableError: the value is neither.
    """
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        return text(value)
    wanted = "a text or a number, or messages of role and content"
    if not value or not all(isinstance(message, Mapping) and {"role", "content"} <= {*message} for message in value):
        raise UnusableError(f"is {type(value).__name__} {str(value)[:_MESSAGE_CHARS]!r}, wanted {wanted}")
    messages = tuple((_role(message["role"]), _content(message["content"])) for message in value)
    why = why_not_messages(messages)
    if why:
        raise UnusableError(f"{why}, wanted {wanted}")
    return messages[0][1] if len(messages) == 1 else messages


def _inside(value: object, path: Sequence[str]) -> object:
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


def _as_text(value: object) -> str | None:
    if isinstance(value, float):
        value = number(repr(value)) if math.isfinite(value) else None
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return None
    if isinstance(value, date | time):  # datetime is a subclass of date
        return value.isoformat()
    if isinstance(value, bool) or not isinstance(value, int | Decimal):
        return None
    if isinstance(value, int):
        return str(value)
    return _decimal(value) if value.is_finite() else None


def _decimal(value: Decimal) -> str:
    exponent = value.as_tuple().exponent
    assert isinstance(exponent, int)
    if exponent > _MAX_WRITTEN_DIGITS or value.adjusted() < -_MAX_WRITTEN_DIGITS:
        return str(value)
    return format(value, "f")


def _role(role: object) -> str:
    return role if isinstance(role, str) else repr(role)


def _content(content: object) -> str:
    """Return the text of a message's content: a string, or a list of parts of type text as in multimodal data sets."""
    if content == "":
        return ""  # an empty system prompt is valid
    if not isinstance(content, list):
        return text(content, "a text")
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise UnusableError(f"has a message with a part of type {kind!r}, wanted only parts of type 'text'")
    return "".join(text(part.get("text"), "a text") for part in content)
