"""Paths of checkpoints on the wire: ``tinker://<run id>/<kind>/<name>``. No other spelling leads to a file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from rlsys.serve.errors import bad_request

Kind = Literal["weights", "sampler_weights", "external_weights"]
KINDS: tuple[Kind, ...] = get_args(Kind)
CHECKPOINT_TYPES: dict[Kind, str] = {
    "weights": "training",
    "sampler_weights": "sampler",
    "external_weights": "external",
}
RUN_ID = re.compile(r"[a-z0-9]{8,64}:train:(?:0|[1-9][0-9]{0,9})", re.ASCII)
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}", re.ASCII)
_PATH = re.compile(r"(?:tinker|mint|rlsys)://([^/]*)/([^/]*)/([^/]*)")
_WANTED = "wanted tinker://<run id>/weights/<name> or tinker://<run id>/sampler_weights/<name>, as a save returned it"


@dataclass(frozen=True, slots=True)
class CheckpointPath:
    """One checkpoint of a run. Its parts are checked, so they are safe as names of folders."""

    run_id: str
    kind: Kind
    name: str

    @property
    def text(self) -> str:
        return f"tinker://{self.run_id}/{self.kind}/{self.name}"

    @property
    def checkpoint_id(self) -> str:
        return f"{self.kind}/{self.name}"


def parse_path(text: str) -> CheckpointPath:
    """
    Raises:
        Refusal: 400: another form.
    """
    match = _PATH.fullmatch(text)
    if match is None:
        raise bad_request(f"path: found {text[:200]!r}; {_WANTED}")
    return checkpoint_of(*match.groups())


def checkpoint_of(run_id: str, kind: str, name: str) -> CheckpointPath:
    """The checkpoint with these parts. Raises as `parse_path`."""
    if not RUN_ID.fullmatch(run_id):
        raise bad_request(f"path: found the run {run_id[:100]!r}; {_WANTED}")
    if kind not in KINDS:  # narrows the type
        raise bad_request(f"path: found the kind {kind[:40]!r}; wanted one of {', '.join(KINDS)}")
    return CheckpointPath(run_id, kind, checked_name(name))


def checked_name(name: str) -> str:
    """
    Raises:
        Refusal: 400: not the name of a checkpoint.
    """
    if not NAME.fullmatch(name):
        raise bad_request(
            f"path: found the name {name[:140]!r}; wanted 1 to 128 letters, digits, '.', '_' and '-', the first no '.'"
        )
    return name


def folder_name(run_id: str) -> str:
    """Name of a run's folder: one to one, because ids have no '.'."""
    assert RUN_ID.fullmatch(run_id)
    return run_id.replace(":", ".")


def run_of_folder(name: str) -> str | None:
    """The run whose folder has this name; None: no run's."""
    run_id = name.replace(".", ":")
    return run_id if RUN_ID.fullmatch(run_id) and "." in name and ":" not in name else None
