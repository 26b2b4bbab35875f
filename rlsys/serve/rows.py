"""Sessions, models and samplers as rows of the database, and back."""

from __future__ import annotations

import json
import time
from datetime import datetime

from rlsys.client.backend import SnapshotHandle
from rlsys.config import LoraSection
from rlsys.serve.database import Database, Row
from rlsys.serve.state import Model, Sampler, Session

RESULTS_KEPT = 8  # by a learner, of a model's latest calls: rlsys.service.call_order


def put_session(database: Database, session: Session) -> None:
    database.put(
        "sessions",
        {
            "id": session.id,
            "tenant": session.tenant,
            "created_at": session.created_at.isoformat(),
            "seen_at": _wall(session.seen),
            "tags": json.dumps(session.tags),
            "user_metadata": json.dumps(session.user_metadata),
            "display_name": session.display_name,
            "sdk_version": session.sdk_version,
            "ended": session.ended,
            "finish_reason": session.finish_reason,
        },
    )


def note_ended(database: Database, session: Session) -> None:
    def write() -> None:
        values = (session.ended, session.finish_reason, _wall(session.seen), session.id)
        database.write("UPDATE sessions SET ended = ?, finish_reason = ?, seen_at = ? WHERE id = ?", values)

    database.eventually(f"end of {session.id}", write)


def forget_session(database: Database, session_id: str) -> None:
    """With its models and samplers."""
    database.eventually(
        f"session {session_id}", lambda: database.write("DELETE FROM sessions WHERE id = ?", (session_id,))
    )


def session_of(row: Row) -> Session:
    """A session that is over keeps its age; one that is open gets its time again, since clients could not reach it."""
    ended = _optional(row["ended"])
    age = 0.0 if ended is None else max(0.0, time.time() - float(row["seen_at"] or 0.0))
    return Session(
        id=str(row["id"]),
        tenant=str(row["tenant"]),
        tags=json.loads(str(row["tags"])),
        user_metadata=json.loads(str(row["user_metadata"])),
        display_name=_optional(row["display_name"]),
        sdk_version=str(row["sdk_version"]),
        created_at=datetime.fromisoformat(str(row["created_at"])),
        seen=time.monotonic() - age,
        ended=ended,
        finish_reason=_optional(row["finish_reason"]),
    )


def put_seen(database: Database, sessions: list[Session]) -> None:
    """When the clients of these sessions were last heard."""

    def write() -> None:
        with database.together():
            for session in sessions:
                database.write("UPDATE sessions SET seen_at = ? WHERE id = ?", (_wall(session.seen), session.id))

    database.eventually("seen", write)


def put_model(database: Database, model: Model) -> None:
    database.put(
        "models",
        {
            "id": model.id,
            "session_id": model.session.id,
            "number": model.number,
            "base": model.base.name,
            "base_model": model.base_model,
            "lora": None if model.lora is None else model.lora.model_dump_json(),
            "next": model.queue.next,
            "failed_passes": model.failed_passes + model.queue.lost_passes,
            "unstepped": model.unstepped,
        },
    )


def forget_model(database: Database, model_id: str) -> None:
    database.eventually(f"model {model_id}", lambda: database.write("DELETE FROM models WHERE id = ?", (model_id,)))


def put_counts(database: Database, model: Model) -> None:
    """What a step will say of the passes before it."""

    def write() -> None:
        failed = model.failed_passes + model.queue.lost_passes
        values = (failed, model.unstepped, model.id)
        database.write("UPDATE models SET failed_passes = ?, unstepped = ? WHERE id = ?", values)

    database.eventually(f"counts of {model.id}", write)


def put_next(database: Database, model_id: str, number: int) -> None:
    """The smallest number of a client's call that has neither begun nor been used up. A call that begins has a row, so
    that a controller that finds an older number here does not take the call's number for a new one."""
    database.eventually(
        f"next of {model_id}",
        lambda: database.write("UPDATE models SET next = ? WHERE id = ?", (number, model_id)),
    )


def put_entered(database: Database, request_id: str, model_id: str, seq: int, is_pass: bool) -> None:
    """A call that a client may ask for by `request_id`, and that has not begun."""
    database.catch_up()
    database.write(
        "INSERT INTO calls (id, model_id, seq, is_pass) VALUES (?, ?, ?, ?)", (request_id, model_id, seq, int(is_pass))
    )


def put_begun(database: Database, request_id: str, model_id: str, number: int, outcome: str) -> None:
    """The learner gets this call as its call `number`; it keeps the results of its latest calls only."""
    database.catch_up()  # so that no older write of this model comes after it
    with database.together():
        database.write("UPDATE calls SET number = ?, outcome = ? WHERE id = ?", (number, outcome, request_id))
        database.write("DELETE FROM calls WHERE model_id = ? AND number <= ?", (model_id, number - RESULTS_KEPT))


def forget_calls(database: Database, model_id: str) -> None:
    """The learner has no result of this model's calls any more."""
    database.eventually(
        f"calls of {model_id}", lambda: database.write("DELETE FROM calls WHERE model_id = ?", (model_id,))
    )


def forget_waiting(database: Database, model_id: str) -> None:
    """Calls that had not begun when an earlier controller ended."""
    statement = "DELETE FROM calls WHERE model_id = ? AND number IS NULL"
    database.eventually(f"waiting calls of {model_id}", lambda: database.write(statement, (model_id,)))


def lora_of(row: Row) -> LoraSection | None:
    return None if row["lora"] is None else LoraSection.model_validate_json(str(row["lora"]))


def put_sampler(database: Database, sampler: Sampler) -> None:
    database.put(
        "samplers",
        {
            "id": sampler.id,
            "session_id": sampler.session.id,
            "number": sampler.number,
            "base": sampler.base.name,
            "base_model": sampler.base_model,
            "path": sampler.path,
            "is_ephemeral": int(sampler.is_ephemeral),
            "snapshot": _snapshot_text(sampler),
            "released": sampler.released,
        },
    )


def note_snapshot(database: Database, sampler: Sampler) -> None:
    """What a sampler that was put holds now, or that it was released."""

    def write() -> None:
        values = (_snapshot_text(sampler), sampler.released, sampler.id)
        database.write("UPDATE samplers SET snapshot = ?, released = ? WHERE id = ?", values)

    database.eventually(f"sampler {sampler.id}", write)


def _snapshot_text(sampler: Sampler) -> str | None:
    handle = sampler.snapshot
    return None if handle is None else json.dumps([handle.key, handle.model_id, handle.version, handle.path])


def snapshot_of(row: Row) -> SnapshotHandle | None:
    """The handle without its reference: its weights are with the samplers, or nowhere."""
    if row["snapshot"] is None:
        return None
    key, model_id, version, path = json.loads(str(row["snapshot"]))
    return SnapshotHandle(key, model_id, version, None, path)


def _wall(monotonic: float) -> float:
    return time.time() - (time.monotonic() - monotonic)


def _optional(value: object) -> str | None:
    return None if value is None else str(value)
