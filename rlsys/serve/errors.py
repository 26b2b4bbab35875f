"""Refusals of the HTTP layer, and how errors of the system read on the wire."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from rlsys.errors import (
    CheckpointError,
    ConfigError,
    DatumError,
    DivergedError,
    GradientError,
    LossError,
    RlsysError,
    SamplingError,
    StorageError,
)

Category = Literal["user", "server", "unknown"]
_USERS = (DatumError, LossError, SamplingError, ConfigError, GradientError, DivergedError, CheckpointError)
_FOLDER = re.compile(r"(?<![\w:/.)<])/(?:[\w.@+-]+/)*[\w.@+-]+")
# A checkpoint's folder, below the tenant's: see rlsys.serve.checkpoints.
_CHECKPOINT = re.compile(
    r"(?<![\w:/.])/(?:[^\s'\":]+/)?([a-z0-9]{8,64})\.train\.([0-9]{1,10})"
    r"/(weights|sampler_weights|external_weights)/([\w-][\w.-]*)",
    re.ASCII,
)


class BusyError(StorageError):
    """Another process holds the database. The request can be repeated."""


class Refusal(Exception):
    """An answer other than 200. Clients repeat 408, 409, 429 and 5xx, and take 400, 403, 404, 410 and 422 as final."""

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, dict(headers or {})

    def __reduce__(self) -> tuple[type[Refusal], tuple[int, str, Mapping[str, str]]]:
        return Refusal, (self.status, self.detail, self.headers)


class NumberedRefusal(Refusal):
    """400 for a call of a model whose number could be read: the number is used up, for the client goes on with the
    next."""

    def __init__(self, detail: str, model_id: str, seq_id: int, is_pass: bool = False) -> None:
        super().__init__(400, detail)
        self.model_id, self.seq_id, self.is_pass = model_id, seq_id, is_pass

    def __reduce__(self) -> tuple[type[NumberedRefusal], tuple[str, str, int, bool]]:  # type: ignore[override]
        return NumberedRefusal, (self.detail, self.model_id, self.seq_id, self.is_pass)


def bad_request(detail: str) -> Refusal:
    return Refusal(400, detail)


def not_found(what: str, name: str) -> Refusal:
    """The same for what does not exist and for what belongs to another tenant."""
    return Refusal(404, f"{what} {name!r}: not found")


@dataclass(frozen=True, slots=True)
class Failure:
    """Result of a promise whose operation failed."""

    error: str
    category: Category


def referenced(failure: Failure, reference: str) -> Failure:
    """A failure of the server names a reference, under which its log has the error. One of the user says all itself."""
    if failure.category == "user":
        return failure
    return Failure(f"{failure.error}; reference {reference}", failure.category)


def failure_of(error: RlsysError, names: Mapping[str, str]) -> Failure:
    return Failure(public_text(str(error), names), "user" if isinstance(error, _USERS) else "server")


def answer_of(error: RlsysError) -> tuple[int, dict[str, str]]:
    """Status and headers of an error of the server that is a request's answer."""
    if isinstance(error, BusyError):
        return 503, {"Retry-After": "1"}
    if isinstance(error, StorageError):  # clients that repeat every 5xx obey this header
        return 507, {"x-should-retry": "false"}
    return 500, {}


def public_text(text: str, names: Mapping[str, str]) -> str:
    """Replace the server's folders: by their public names, where `names` (folder -> name) has one; a checkpoint's by
    its path, which names no tenant."""
    for folder in sorted(names, key=len, reverse=True):
        text = text.replace(folder, names[folder])
    text = _CHECKPOINT.sub(r"tinker://\1:train:\2/\3/\4", text)
    known = set(names.values())
    return _FOLDER.sub(lambda match: match[0] if match[0] in known else "(a folder of the server)", text)
