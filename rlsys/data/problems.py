"""Problem sets in columnar form, and the order of problems in a run.

Axes: N problems of a set, P problems of a batch. A batch is an array of problem ids, computed from the step and the
seed alone: resuming a run needs no further state.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from rlsys.data.messages import Messages
from rlsys.errors import ConfigError
from rlsys.rollouts import offsets_of, spans
from rlsys.types import Array

# questions, or messages -> prompt tokens of each
Encode = Callable[[Sequence[str | Messages]], Sequence[Sequence[int]]]
EVAL_SEED = 99  # of every run: runs with other seeds are compared on the same held-out problems


@dataclass(frozen=True, slots=True)
class Problem:
    """Prompt and reference answer."""

    prompt: str  # the question; with `messages`, their text for reports and for deduplication
    answer: str  # reference answer, which the grader compares with
    messages: Messages = ()  # if given, the model reads these messages instead of `prompt`

    @classmethod
    def of_messages(cls, messages: Messages, answer: str) -> Problem:
        """Build a problem from messages; a single user message is treated as a question.

        The system message is not part of `prompt`: for deduplication the same question is the same problem whatever
        its system message.
        """
        turns = [(role, content) for role, content in messages if role != "system"]
        prompt = turns[0][1] if len(turns) == 1 else "\n".join(f"{role}: {content}" for role, content in turns)
        return cls(prompt, answer, () if len(messages) == 1 else messages)


def distinct(draw: Callable[[], Problem], count: int) -> tuple[Problem, ...]:
    """Generate `count` problems with different prompts; fewer if 20 * count + 1000 draws yield fewer."""
    by_prompt: dict[str, Problem] = {}
    for _ in range(20 * count + 1000):
        problem = draw()
        by_prompt.setdefault(problem.prompt, problem)
        if len(by_prompt) == count:
            break
    return tuple(by_prompt.values())


@dataclass(frozen=True, slots=True)
class ProblemSet:
    """N problems with their prompt tokens, concatenated."""

    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    prompt_tokens: Array  # int32
    prompt_offsets: Array  # (N + 1,) int64
    dropped: int = 0  # number of problems left out because their prompts were too long

    def __post_init__(self) -> None:
        assert len(self.prompts) == len(self.answers) == len(self.prompt_offsets) - 1
        assert self.prompt_offsets[-1] == len(self.prompt_tokens)

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def digest(self) -> str:
        """Hash (128 bits, hexadecimal) of the problems in their order: prompts, answers and tokens."""
        content = hashlib.blake2b(digest_size=16)
        for text in (*self.prompts, *self.answers):
            content.update(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest())
        content.update(self.prompt_tokens.tobytes())
        content.update(self.prompt_offsets.tobytes())
        return content.hexdigest()

    def select(self, ids: Array | Sequence[int]) -> tuple[Array, Array]:
        """Return the concatenated prompt tokens (int32) of (P,) ids, and their (P + 1,) offsets.

        offsets 0 2 5 9, ids 2 0   ->   starts 5 0, lengths 4 2, out 0 4 6, gather 5 6 7 8 0 1
        """
        ids = np.asarray(ids, dtype=np.int64)
        assert ids.size == 0 or (ids.min() >= 0 and ids.max() < len(self)), f"ids outside 0..{len(self) - 1}"
        starts = self.prompt_offsets[ids]
        lengths = self.prompt_offsets[ids + 1] - starts
        offsets = offsets_of(lengths)
        return self.prompt_tokens[spans(starts, lengths)], offsets


def occurrences(problems: Array, before: Array | Sequence[int] = ()) -> Array:
    """Count the earlier occurrences of each problem, in `before` or in `problems` itself: 7 3 7 7 -> 0 0 1 2.

    Returns (P,) int64.
    """
    counts = Counter(np.asarray(before, np.int64).tolist())
    earlier = np.empty(len(problems), np.int64)
    for i, problem in enumerate(np.asarray(problems).tolist()):
        earlier[i] = counts[problem]
        counts[problem] += 1
    return earlier


def encode(problems: Sequence[Problem], encode_fn: Encode, max_tokens: int | None = None) -> ProblemSet:
    """Tokenize problems; prompts of more than `max_tokens` are dropped, and ids number the remaining problems.

    `encode_fn` returns the prompt tokens of each question, or of the messages if a problem has them.

    Raises:
        ConfigError: there are no problems, a prompt cannot be rendered or has no tokens, or all prompts are too long.
    """
    if not problems:
        raise ConfigError("task: found no problems; wanted at least 1")
    rows = [np.asarray(row, dtype=np.int32) for row in _tokens(problems, encode_fn)]
    lengths = [len(row) for row in rows]
    if 0 in lengths:
        i = lengths.index(0)
        raise ConfigError(f"task: problem {i}: prompt {problems[i].prompt!r} has no tokens; wanted at least 1")
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


def _tokens(problems: Sequence[Problem], encode_fn: Encode) -> Sequence[Sequence[int]]:
    questions = [problem.messages or problem.prompt for problem in problems]
    try:
        return encode_fn(questions)
    except ConfigError:
        for i, problem in enumerate(problems):  # which of them it is
            _try_alone(problem, i, encode_fn)
        raise


def _try_alone(problem: Problem, index: int, encode_fn: Encode) -> None:
    try:
        encode_fn([problem.messages or problem.prompt])
    except ConfigError as error:
        if not problem.messages:
            raise
        raise ConfigError(f"task: problem {index}, {problem.prompt[:80]!r}, is a list of messages: {error}") from error


@dataclass(frozen=True, slots=True)
class Epochs:
    """Endless sequence of batches of problem ids; each epoch is a new permutation.

    The permutations are concatenated and cut every `batch` ids: no batch is short, and a batch may span two epochs.
    Each batch is computed from its step number, without the batches before it.
    """

    num_problems: int
    batch: int
    seed: int

    def __post_init__(self) -> None:
        if self.num_problems < 1 or self.batch < 1:
            raise ConfigError(
                f"found {self.num_problems} problems in batches of {self.batch}; wanted at least 1 problem and batches "
                "of at least 1"
            )

    def __iter__(self) -> Iterator[Array]:
        step = 0
        while True:
            yield self.batch_at(step)
            step += 1

    def batch_at(self, step: int) -> Array:
        """Return the (P,) int64 ids of step 0, 1, ..."""
        return self.take(step * self.batch, self.batch)

    def take(self, first: int, count: int) -> Array:
        """Return the (count,) int64 ids at positions first, first + 1, ... of the sequence."""
        assert first >= 0 and count >= 0
        if count == 0:
            return np.empty(0, np.int64)
        epochs = range(first // self.num_problems, (first + count - 1) // self.num_problems + 1)
        ids = np.concatenate([self._permutation(epoch) for epoch in epochs])
        start = first - epochs.start * self.num_problems
        return ids[start : start + count]

    def _permutation(self, epoch: int) -> Array:
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_problems).astype(np.int64)
