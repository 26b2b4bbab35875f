"""Problems as columns, and the order in which a run meets them.

Axes: N problems of a set, P of a batch. A batch is an array of ids: nothing but ids has to be remembered to resume.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlsys.data.messages import Messages
from rlsys.errors import ConfigError
from rlsys.rollouts import offsets_of, spans
from rlsys.types import Array


@dataclass(frozen=True, slots=True)
class Problem:
    """What the model is asked and what a grader compares with."""

    prompt: str  # the question; of messages, what people and the search for repeated problems see
    answer: str
    messages: Messages = ()  # what the model is asked instead, where it is more than a question

    @classmethod
    def of_messages(cls, messages: Messages, answer: str) -> Problem:
        """A single message of the user's is a question like any other.

        Whatever system message comes first, the same question is the same problem.
        """
        said = [(role, content) for role, content in messages if role != "system"]
        prompt = said[0][1] if len(said) == 1 else "\n".join(f"{role}: {content}" for role, content in said)
        return cls(prompt, answer, () if len(messages) == 1 else messages)


def distinct(draw: Callable[[], Problem], count: int) -> tuple[Problem, ...]:
    """So many problems with different prompts; fewer where drawing does not come upon them."""
    found: dict[str, Problem] = {}
    for _ in range(20 * count + 1000):
        problem = draw()
        found.setdefault(problem.prompt, problem)
        if len(found) == count:
            break
    return tuple(found.values())


@dataclass(frozen=True, slots=True)
class ProblemSet:
    """N problems; the prompts' tokens lie end to end."""

    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    prompt_tokens: Array  # int32
    prompt_offsets: Array  # (N + 1,) int64
    dropped: int = 0  # further problems, whose prompts were too long

    def __post_init__(self) -> None:
        assert len(self.prompts) == len(self.answers) == len(self.prompt_offsets) - 1
        assert self.prompt_offsets[-1] == len(self.prompt_tokens)

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def digest(self) -> str:
        """Of all that a run sees of the problems, in their order: texts, answers, tokens."""
        found = hashlib.blake2b(digest_size=16)
        for text in (*self.prompts, *self.answers):
            found.update(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest())
        found.update(self.prompt_tokens.tobytes())
        found.update(self.prompt_offsets.tobytes())
        return found.hexdigest()

    def select(self, ids: Array | Sequence[int]) -> tuple[Array, Array]:
        """(P,) ids -> the P prompts' tokens end to end (int32) and their (P + 1,) offsets.

        offsets 0 2 5 9, ids 2 0   ->   starts 5 0, lengths 4 2, out 0 4 6, gather 5 6 7 8 0 1
        """
        ids = np.asarray(ids, dtype=np.int64)
        assert ids.size == 0 or (ids.min() >= 0 and ids.max() < len(self)), f"ids outside 0..{len(self) - 1}"
        starts = self.prompt_offsets[ids]
        lengths = self.prompt_offsets[ids + 1] - starts
        offsets = offsets_of(lengths)
        return self.prompt_tokens[spans(starts, lengths)], offsets


def occurrences(problems: Array, before: Array | Sequence[int] = ()) -> Array:
    """(P,) int64, how often each problem comes earlier, in `before` or in `problems` itself: 7 3 7 7 -> 0 0 1 2."""
    times = Counter(np.asarray(before, np.int64).tolist())
    found = np.empty(len(problems), np.int64)
    for at, problem in enumerate(np.asarray(problems).tolist()):
        found[at] = times[problem]
        times[problem] += 1
    return found


def encode(
    problems: Sequence[Problem], encode_fn: Callable[[Any], Sequence[int]], max_tokens: int | None = None
) -> ProblemSet:
    """Problems with their prompts' tokens; those of more than `max_tokens` are dropped, and ids count the others.

    `encode_fn` takes a question, or messages where the problem has them.

    Raises:
        ConfigError: there are no problems, or a prompt cannot be written or has no token, or every one is too long.
    """
    if not problems:
        raise ConfigError("task: found no problems; wanted at least 1")
    rows = [np.asarray(_tokens(problem, at, encode_fn), dtype=np.int32) for at, problem in enumerate(problems)]
    lengths = [len(row) for row in rows]
    if 0 in lengths:
        at = lengths.index(0)
        raise ConfigError(f"task: problem {at}: prompt {problems[at].prompt!r} has no token; wanted at least 1")
    kept = [i for i, length in enumerate(lengths) if max_tokens is None or length <= max_tokens]
    if not kept:
        raise ConfigError(
            f"prompt.max_tokens: found {max_tokens}; wanted at least {min(lengths)}, the shortest of "
            f"{len(problems)} prompts"
        )
    return ProblemSet(
        prompts=tuple(problems[i].prompt for i in kept),
        answers=tuple(problems[i].answer for i in kept),
        prompt_tokens=np.concatenate([rows[i] for i in kept]),
        prompt_offsets=offsets_of([lengths[i] for i in kept]),
        dropped=len(problems) - len(kept),
    )


def _tokens(problem: Problem, at: int, encode_fn: Callable[[Any], Sequence[int]]) -> Sequence[int]:
    try:
        return encode_fn(problem.messages or problem.prompt)
    except ConfigError as error:
        if not problem.messages:
            raise
        raise ConfigError(f"task: problem {at}, {problem.prompt[:80]!r}, is a list of messages: {error}") from error


@dataclass(frozen=True, slots=True)
class Epochs:
    """Batches of problem ids for ever: each epoch is a fresh permutation, laid end to end and cut every `batch` ids.

    No batch is short: one that reaches the end of an epoch goes on into the next. Any step can be asked for alone.
    """

    num_problems: int
    batch: int
    seed: int

    def __post_init__(self) -> None:
        if self.num_problems < 1 or self.batch < 1:
            raise ConfigError(
                f"found {self.num_problems} problems in batches of {self.batch}; wanted at least 1 of each"
            )

    def __iter__(self) -> Iterator[Array]:
        step = 0
        while True:
            yield self.batch_at(step)
            step += 1

    def batch_at(self, step: int) -> Array:
        """The (P,) int64 ids of step 0, 1, ..."""
        return self.take(step * self.batch, self.batch)

    def take(self, first: int, count: int) -> Array:
        """The (count,) int64 ids at places first, first + 1, ... of the order, wherever a batch begins."""
        assert first >= 0 and count >= 0
        if count == 0:
            return np.empty(0, np.int64)
        epochs = range(first // self.num_problems, (first + count - 1) // self.num_problems + 1)
        ids = np.concatenate([self._permutation(epoch) for epoch in epochs])
        start = first - epochs.start * self.num_problems
        return ids[start : start + count]

    def _permutation(self, epoch: int) -> Array:
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_problems).astype(np.int64)
