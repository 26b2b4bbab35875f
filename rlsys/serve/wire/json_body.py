"""Reads JSON bodies strictly: what two readers could take differently is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rlsys.serve.errors import NumberedRefusal, bad_request

Model = TypeVar("Model", bound="WireModel")
MAX_SHOWN = 5  # problems of a body that one answer names
# Python needs up to 64 bytes for one byte of JSON: bodies are refused by these numbers before they are parsed.
MAX_COMMAS = 10_000_000
OF_CALL, OF_PASS = 50_000, 300_000  # brackets, and colons; 1,024 datums of a hundred chunks have 210,000
T = TypeVar("T")
# Without it pydantic collects one error per wrong item: a minute and gigabytes for a body of 16 MiB.
Items = Annotated[list[T], Field(fail_fast=True)]


def at_most(number: int) -> Callable[[object], object]:
    """A validator that refuses larger dictionaries before their values are checked, for the same reason."""

    def check(value: object) -> object:
        if isinstance(value, dict) and len(value) > number:
            raise ValueError(f"found {len(value)} keys; wanted at most {number}")
        return value

    return check


class WireModel(BaseModel):
    """Base of all request bodies: unknown fields are ignored, an explicit null counts as missing, types are strict."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: object) -> object:
        if isinstance(value, dict) and None in value.values():
            return {key: each for key, each in value.items() if each is not None}
        return value


def parse(kind: type[Model], body: bytes) -> Model:
    """The body as a model.

    Raises:
        Refusal: 400; the text names the field, what was found and what was wanted.
    """
    return as_model(kind, load(body))


def as_model(kind: type[Model], value: object, is_pass: bool = False) -> Model:
    """As `parse`, of a value that was read. `is_pass`: the body of a forward_backward.

    Raises:
        NumberedRefusal: as `parse`, and the value names a call of a model.
    """
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        model_id, seq_id = (value.get("model_id"), value.get("seq_id")) if isinstance(value, dict) else (None, None)
        if isinstance(model_id, str) and isinstance(seq_id, int) and not isinstance(seq_id, bool):
            raise NumberedRefusal(_problems(error), model_id, seq_id, is_pass) from None
        raise bad_request(_problems(error)) from None


def load(body: bytes, most: int = OF_CALL) -> Any:  # Any: JSON has no static type
    """The value of a JSON text.

    Raises:
        Refusal: 400: no JSON, no UTF-8, a duplicate key, NaN or Infinity, or nested too deeply.
    """
    if not body:
        raise bad_request("body: found none; wanted a JSON object")
    for name, found, limit in (
        ("brackets", body.count(b"{") + body.count(b"["), most),
        ("colons", body.count(b":"), most),
        ("commas", body.count(b","), MAX_COMMAS),
    ):
        if found > limit:
            raise bad_request(f"body: found JSON with {found} {name}; wanted at most {limit}")
    try:
        return json.loads(body.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise bad_request(f"body: found bytes that are no UTF-8 at {error.start}; wanted JSON in UTF-8") from None
    except RecursionError:
        raise bad_request("body: found JSON nested too deeply") from None
    except ValueError as error:  # JSONDecodeError, and an integer with more digits than Python converts
        raise bad_request(f"body: found no valid JSON: {str(error)[:200]}") from None


def is_text(value: str) -> bool:
    """Whether a string is text that UTF-8 can hold: JSON can spell half of a character, which engines and tokenizers
    fail at."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        key = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise bad_request(f"body: found the key {key[:80]!r} twice in one object")
    return found


def _refuse_constant(name: str) -> object:
    raise bad_request(f"body: found {name}, which is not JSON; wanted finite numbers")


def _problems(error: ValidationError) -> str:
    found = []
    for problem in error.errors(include_url=False, include_context=False)[:MAX_SHOWN]:
        where = ".".join(map(str, problem["loc"])) or "body"
        value = "" if problem["type"] == "missing" else f"; found {_short(problem['input'])}"
        found.append(f"{where[:200]}: {problem['msg']}{value}")
    return "; ".join(found)


def _short(value: object) -> str:
    text = repr(value) if isinstance(value, str | int | float | bool) else f"a {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."
