"""What an answer of the learner becomes for a client. An outcome is kept as JSON while its call runs, so that a new
controller can finish a call that an earlier one began."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np

from rlsys.client.backend import SnapshotHandle
from rlsys.client.requests import Request, Skip, TakeSnapshot
from rlsys.errors import CheckpointError, ConfigError, RlsysError
from rlsys.serve import sessions
from rlsys.serve.checkpoints import Record, size_of
from rlsys.serve.paths import CheckpointPath, Kind, parse_path
from rlsys.serve.state import Model, Sampler, State
from rlsys.serve.wire.passes import OutputLayout
from rlsys.serve.wire.results import JsonResult, PassResult, Result, laid_out
from rlsys.types import BatchResult

FAILED_PARTS = "failed_forward_backward"  # metric of a step: calls since the last step whose gradient is not in it
SAVES: dict[Kind, str] = {
    "weights": "save_weights",
    "sampler_weights": "save_weights_for_sampler",
    "external_weights": "save_weights_external",
}


class Outcome:
    """Base of all. `kind`: its name in the database; `repeated`: a request that gets the answer of an earlier one.

    A bare one belongs to a call that fails before it has an outcome, so `result` is never asked of it.
    """

    kind: ClassVar[str]
    repeated: ClassVar[Request[Any]] = Skip()  # Any: each request has its own answer

    async def result(self, state: State, model: Model, answer: Any) -> Result:  # Any: each kind has its own answer
        raise AssertionError("a call that failed before it had an outcome was answered")

    def failed(self, state: State, model: Model, error: RlsysError) -> RlsysError:
        """The error that the client gets; undoes what was prepared for the call."""
        return error

    def fields(self) -> dict[str, Any]:  # Any: JSON
        return {}

    def text(self) -> str:
        return json.dumps([self.kind, self.fields()])


@dataclass(frozen=True, slots=True)
class PassOutcome(Outcome):
    kind = "pass"
    layout: OutputLayout
    has_gradient: bool

    async def result(self, state: State, model: Model, answer: BatchResult) -> Result:
        model.unstepped += self.has_gradient
        return PassResult(answer.metrics, laid_out(answer.logprobs, self.layout), self.layout)

    def failed(self, state: State, model: Model, error: RlsysError) -> RlsysError:
        model.failed_passes += self.has_gradient
        return error

    def fields(self) -> dict[str, Any]:
        layout = self.layout
        return {
            "lengths": layout.lengths.tolist(),
            "columns": layout.columns.tolist(),
            "has_gradient": self.has_gradient,
        }


@dataclass(frozen=True, slots=True)
class StepOutcome(Outcome):
    kind = "step"

    async def result(self, state: State, model: Model, answer: dict[str, float]) -> Result:
        failed = model.failed_passes + model.queue.lost_passes
        model.failed_passes = model.queue.lost_passes = model.unstepped = 0
        shown = {**answer, FAILED_PARTS: float(failed)} if failed else answer
        return JsonResult({"type": "optim_step", "metrics": shown})


@dataclass(frozen=True, slots=True)
class LoadOutcome(Outcome):
    kind = "load"
    path: str
    folder: str

    async def result(self, state: State, model: Model, answer: str) -> Result:
        model.failed_passes = model.queue.lost_passes = model.unstepped = 0
        return JsonResult({"type": "load_weights", "path": self.path})

    def failed(self, state: State, model: Model, error: RlsysError) -> RlsysError:
        return _named(error, self.folder, self.path)

    def fields(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class SaveOutcome(Outcome):
    """`record` is written before the save, so that a checkpoint is never without its owner and expiry; `before` is the
    one that it replaced."""

    kind = "save"
    path: CheckpointPath
    record: Record
    before: Record | None

    async def result(self, state: State, model: Model, answer: str) -> Result:
        tenant = model.session.tenant
        size = await asyncio.to_thread(size_of, state.store.folder(tenant, self.path))
        state.store.note_size(tenant, self.path, size)
        return JsonResult({"type": SAVES[self.path.kind], "path": self.path.text})

    def failed(self, state: State, model: Model, error: RlsysError) -> RlsysError:
        tenant = model.session.tenant
        state.store.put_back(tenant, self.path, self.before)
        if isinstance(error, CheckpointError) and "is already there" in str(error):
            return taken(self.path)
        return _named(error, str(state.store.folder(tenant, self.path)), self.path.text)

    def fields(self) -> dict[str, Any]:
        before = None if self.before is None else self.before.model_dump(mode="json")
        return {"path": self.path.text, "record": self.record.model_dump(mode="json"), "before": before}


@dataclass(frozen=True, slots=True)
class SnapshotOutcome(Outcome):
    """A sampling session of the current weights. `number`: of the sampler in its session."""

    kind = "snapshot"
    repeated = TakeSnapshot()  # its answer is registered with the samplers
    number: int

    async def result(self, state: State, model: Model, answer: SnapshotHandle) -> Result:
        session = model.session
        sampler = Sampler(
            id=f"{session.id}:sample:{self.number}",
            session=session,
            base=model.base,
            base_model=model.base_model,
            number=self.number,
            snapshot=answer,
            path=None,
            is_ephemeral=True,
        )
        if session.ended is not None:
            state.backend.release(model.base, answer)
            raise ConfigError(f"the session of this model has ended: {session.ended}")
        sessions.open_sampler(state, sampler)
        return JsonResult({"type": "save_weights_for_sampler", "sampling_session_id": sampler.id})

    def fields(self) -> dict[str, Any]:
        return asdict(self)


def outcome_of(text: str) -> Outcome:
    """The outcome that ``Outcome.text`` wrote."""
    kind, fields = cast("tuple[str, dict[str, Any]]", json.loads(text))
    match kind:
        case "pass":
            layout = OutputLayout(np.array(fields["lengths"], np.int64), np.array(fields["columns"], np.int64))
            return PassOutcome(layout, fields["has_gradient"])
        case "step":
            return StepOutcome()
        case "load":
            return LoadOutcome(**fields)
        case "save":
            before = None if fields["before"] is None else Record.model_validate(fields["before"])
            return SaveOutcome(parse_path(fields["path"]), Record.model_validate(fields["record"]), before)
        case "snapshot":
            return SnapshotOutcome(**fields)
    raise AssertionError(f"{kind!r}: found an outcome that no version writes")


def taken(path: CheckpointPath) -> CheckpointError:
    return CheckpointError(f"{path.text}: is already there; wanted another name, or overwrite=True")


def _named(error: RlsysError, folder: str | Path, path: str) -> RlsysError:
    """Errors of a checkpoint name its path, and never its folder."""
    return type(error)(str(error).replace(str(folder), path))
