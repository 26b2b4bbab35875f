"""Several learner ranks behind a deployment. Rank 0 decides the order of turns, and the others follow it.

Every rank holds all runs and takes its share of each batch, as in a job (rlsys/distributed/ranks.py). Rank 0 sends each
turn to the others before it takes the turn itself. A pass has equally many turns on every rank, and the ranks sum their
results in the last one. Checkpoints are read and written by rank 0 only; it sends the others what it read.

If a rank dies, does not come to a sum within the limit, or ends a piece of work otherwise than rank 0, the ranks no
longer hold the same runs: then the learner is broken, and all its ranks end.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from actors.cluster.meeting_point import meeting_point
from actors.faults.actor_calls import as_raised
from actors.forking.servers import forked_learner
from actors.service.placement import actor_options
from rlsys.client.config import HostSpec
from rlsys.client.requests import Request
from rlsys.errors import ActorDiedError, ActorFailedError, RlsysError, StalledError
from rlsys.service.host_turns import HostTurns, Turn, in_thread
from rlsys.utils.text_files import first_line

if TYPE_CHECKING:  # loaded with torch, in the actors
    from actors.forking.job_server import ServerAddress
    from rlsys.distributed.ranks import Ranks
    from rlsys.service.learner_host import TrainingHost

WATCH = "watch"  # concurrency group of the call that ends with the actor
Load = Callable[["HostSpec", "Ranks | None"], "TrainingHost"]


@dataclass(frozen=True, slots=True)
class RankTurn:
    """How a turn ended on a rank other than 0."""

    done: bool
    error: RlsysError | None
    digest: str | None  # of a snapshot


class LearnerRank:
    """Actor of a rank other than 0. Its methods run in one thread, in the order of the calls."""

    def __init__(self, spec: HostSpec, rank: int, load: Load) -> None:
        self.spec, self.rank, self.load = spec, rank, load
        self.turns: HostTurns | None = None

    def start(self, address: str) -> None:
        """Meet the other ranks and load the base."""
        self.turns = HostTurns(self.load(self.spec, joined(self.spec, address, self.rank)))

    def turn(self, number: int, model_id: str, request: Request[Any] | None) -> RankTurn:
        assert self.turns is not None, "rank 0 calls start() first"
        try:
            turn = self.turns.turn(number, model_id, request)
        except Exception as error:
            return RankTurn(True, _pickled(error, self.rank), None)
        return RankTurn(turn.done, None, _digest(turn.answer))

    def close(self, number: int) -> None:
        assert self.turns is not None, "rank 0 calls start() first"
        self.turns.close(number)

    @ray.method(concurrency_group=WATCH)
    def wait_for_the_end(self) -> None:
        """Never returns; the call fails when the actor dies."""
        threading.Event().wait()


class SeveralRanks:
    """`rlsys.service.turn_loop.TurnTaker` on rank 0. `broken`: called with an error after which no rank can go on."""

    def __init__(
        self,
        spec: HostSpec,
        thread: ThreadPoolExecutor,
        broken: Callable[[Exception], None],
        server: ServerAddress | None,
    ) -> None:
        self._spec, self._thread, self._broken, self._server = spec, thread, broken, server
        self._limit_s = spec.rank_timeout_s
        self._followers: list[ActorHandle] = []
        self._last: dict[int, list[ray.ObjectRef]] = {}  # number of joint work -> the others' last turns
        self._watching: list[asyncio.Task[None]] = []

    async def start(self, load: Load) -> TrainingHost:
        """Start the other ranks, meet them and load the base.

        Raises:
            RlsysError: what failed first.
        """
        others = range(1, self._spec.learner.num_workers)
        self._followers = [_launched(self._spec, rank, load, self._server) for rank in others]
        address = meeting_point()
        started = [_answer(rank.start.remote(address), i) for i, rank in enumerate(self._followers, 1)]

        def join_and_load() -> TrainingHost:
            return load(self._spec, joined(self._spec, address, 0))

        host, *_ = await asyncio.gather(in_thread(self._thread, join_and_load), *started)
        self._host, self._turns = host, HostTurns(host)
        self._watching = [asyncio.create_task(self._watch(i)) for i in range(len(self._followers))]
        return host

    async def turn(self, number: int, model_id: str, request: Request[Any] | None) -> Turn:
        own, sent = request, None
        if request is not None:
            own, others = await in_thread(self._thread, self._split, model_id, request)
            if others is not None:
                self._last[number], sent = [], ray.put(others)
        if number in self._last:
            self._last[number] = [rank.turn.remote(number, model_id, sent) for rank in self._followers]
        try:
            turn = await in_thread(self._thread, self._turns.turn, number, model_id, own)
        except Exception as error:
            raise await self._failed(number, error) from error
        if turn.done:
            await self._compare(number, None, _digest(turn.answer))
        return turn

    async def close(self, number: int) -> None:
        if self._last.pop(number, None) is not None:
            for rank in self._followers:
                rank.close.remote(number)
        await in_thread(self._thread, self._turns.close, number)

    def stop(self) -> None:
        for task in self._watching:
            task.cancel()
        for rank in self._followers:
            ray.kill(rank)

    async def _failed(self, number: int, error: Exception) -> Exception:
        """The error of a request that failed on rank 0: of another rank, if it failed there first."""
        if isinstance(error, StalledError | ActorDiedError):  # in a sum over ranks, which has no second try
            return self._break(error)
        theirs = await self._compare(number, error, None)
        return theirs[0] if theirs and type(error) is ActorFailedError else error

    async def _compare(self, number: int, error: Exception | None, digest: str | None) -> list[RlsysError]:
        """Wait until the others have ended the work, and compare. Returns their errors.

        Raises:
            ActorDiedError: the ranks differ.
        """
        refs = self._last.pop(number, [])
        try:
            ends: list[RankTurn] = await asyncio.wait_for(
                asyncio.gather(*(_answer(ref, i) for i, ref in enumerate(refs, 1))), self._limit_s
            )
        except TimeoutError:
            raise self._break(
                StalledError(f"learner: a rank did not end its turn within {self._limit_s:g} s")
            ) from None
        except RlsysError as lost:
            raise self._break(lost) from lost
        for rank, end in enumerate(ends, 1):
            if not end.done or (end.error is None) != (error is None) or (error is None and end.digest != digest):
                ours = "ended" if error is None else f"failed ({first_line(error)})"
                other = f"failed ({first_line(end.error)})" if end.error else "ended" if end.done else "has not ended"
                raise self._break(
                    ActorDiedError(
                        f"learner: work that {ours} on rank 0 {other} on rank {rank}, or left another adapter there: "
                        "the ranks hold different runs, so all of them end"
                    )
                )
        return [end.error for end in ends if end.error is not None]

    def _split(self, model_id: str, request: Request[Any]) -> tuple[Request[Any], Request[Any] | None]:
        from rlsys.service.joint_work import split  # imports torch

        return split(self._host, model_id, request)

    def _break(self, error: Exception) -> Exception:
        self._broken(error)
        return error

    async def _watch(self, index: int) -> None:
        try:
            await _answer(self._followers[index].wait_for_the_end.remote(), index + 1)
        except RlsysError as error:
            self._break(error)


def joined(spec: HostSpec, address: str, rank: int) -> Ranks:
    from rlsys.distributed.ranks import Ranks

    return Ranks.join(address, rank, spec.learner.num_workers, spec.learner.device, spec.rank_timeout_s)


def _launched(spec: HostSpec, rank: int, load: Load, server: ServerAddress | None) -> ActorHandle:
    """Owned by rank 0: Ray ends it when rank 0 dies."""
    remote = ray.remote(concurrency_groups={WATCH: 1})(LearnerRank)
    options = forked_learner(actor_options(spec.learner, rank), server)
    return remote.options(**options).remote(spec, rank, load)


async def _answer(ref: ray.ObjectRef, rank: int) -> Any:  # of a handle's method, which has no type
    try:
        return await ref
    except RayError as error:
        raise as_raised(error, f"learner rank {rank}") from None


def _digest(answer: object) -> str | None:
    update = getattr(answer, "ref", None)
    snapshot = getattr(update, "snapshot", None)
    return None if snapshot is None else str(snapshot.digest)


def _pickled(error: Exception, rank: int) -> RlsysError:
    if isinstance(error, RlsysError):
        return error
    return ActorFailedError(f"learner rank {rank}: {type(error).__name__}: {first_line(error)}")
