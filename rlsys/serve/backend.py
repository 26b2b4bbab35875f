"""What the HTTP layer needs of learner and samplers. Frozen dataclasses and arrays cross this border.

``actors.service.http_backend`` implements it on Ray deployments.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rlsys.answer_parts import AnswerParts, PartsRequest
from rlsys.client.backend import About, Adopted, Answer, SampleAnswer, SnapshotHandle
from rlsys.client.requests import Request
from rlsys.config import LoraSection
from rlsys.types import Array, SamplingParams


@dataclass(frozen=True, slots=True)
class Base:
    """One base model that runs with a learner and samplers."""

    name: str
    aliases: tuple[str, ...]
    tokenizer: str | None  # hub name that clients load instead of the model's name
    about: About  # its folder is never shown to clients
    max_sequences: int = 256  # completions that its engines compute at once


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """n completions of one prompt, and what was asked about the prompt itself."""

    prompt: Array  # (N,) int32
    n: int
    params: SamplingParams
    prompt_logprobs: bool
    topk: int


class ServeBackend(Protocol):
    """Learners and samplers of the served bases. Every operation that fails raises an RlsysError."""

    @property
    def bases(self) -> Mapping[str, Base]:
        """By name, without aliases."""

    async def create_model(self, base: Base, model_id: str, tenant: str, lora: LoraSection, seed: int) -> None: ...

    async def restore_model(
        self, base: Base, model_id: str, tenant: str, folder: Path, optimizer: bool
    ) -> LoraSection: ...

    def call(self, model_id: str, number: int, request: Request[Answer]) -> asyncio.Future[Answer]:
        """Submit a request. The learner executes a model's requests by number, from 1 without gaps. A number that was
        used before gives the first request's answer, as long as the learner keeps it."""

    def drop_model(self, model_id: str, number: int) -> None:
        """Release a model after its requests before `number`. Never raises."""

    async def adopt(self, base: Base, model_ids: Sequence[str], snapshot_keys: Sequence[str]) -> Adopted:
        """Take over models and snapshots of an earlier process. Those that are gone are left out; those that are there
        and not named are released in time."""

    async def open_snapshot(self, base: Base, folder: Path) -> SnapshotHandle: ...

    def release(self, base: Base, snapshot: SnapshotHandle) -> None:
        """Release a snapshot that will not be requested again. Never raises."""

    async def check(self, base: Base) -> None:
        """Return if the learner and all samplers of a base answer within seconds.

        Raises:
            RlsysError: one does not; the message names it.
        """

    async def sample(self, base: Base, snapshot: SnapshotHandle | None, request: SampleRequest) -> SampleAnswer:
        """Sample from a snapshot; None: from the base. A cancelled call is aborted in the engine."""

    def parts(
        self, base: Base, snapshot: SnapshotHandle | None, request: PartsRequest
    ) -> AsyncGenerator[AnswerParts, None]:
        """As `sample`, in parts as they are sampled. Closing the generator aborts the request in the engine."""
