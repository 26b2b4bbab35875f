"""Trains a base model from scratch with cross-entropy on a task's examples, until it passes the gate.

The gate measures whether the model can solve problems from prompts that already start the worked steps: greedy decoding
must reach the required accuracy. Whether the model shows its steps unprompted is left to reinforcement learning. The
learning rate warms up, stays constant until the gate is passed, and then falls linearly to 1/25, which ends the stage.
"""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlsys import losses, tasks
from rlsys.bootstrap.bpe_tokenizer import build_tokenizer
from rlsys.config import JobConfig, SupervisedSection
from rlsys.data.problems import Epochs, Problem
from rlsys.datums import DatumBatch
from rlsys.errors import ConfigError, QualityError
from rlsys.learner.learner import Learner
from rlsys.learner.runs import BASE_RUN
from rlsys.modeling.base_model import initial_model
from rlsys.rollouts import offsets_of, spans
from rlsys.tasks import ConversationTask, TeachableTask
from rlsys.tokenization.control_tokens import control_tokens
from rlsys.tokenization.stop_conditions import eos_id, stop_conditions_of_tokenizer
from rlsys.types import AdamParams, Array
from rlsys.utils.atomic_files import new_folder

OPTIMIZER: Literal["muon"] = "muon"  # for 2-D weights except embeddings; AdamW for the others
BETAS = (0.9, 0.98)
GRAD_CLIP_NORM = 1.0
FINAL_SHARE = 0.04  # learning rate at the end of the decay, as a share of the peak
TOKENIZER_TEXTS = 3000  # texts that train the tokenizer; more do not change relevant merges

OnStep = Callable[[int, Mapping[str, float]], None]


@dataclass(frozen=True, slots=True)
class Examples:
    """E texts as concatenated token ids; each has at least two tokens."""

    tokens: Array  # (T,) int32
    taught: Array  # (T,) bool; False for an environment's reply, which the loss leaves out
    offsets: Array  # (E + 1,) int64

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def batch(self, ids: Array) -> DatumBatch:
        """Build the batch of the examples `ids` for next-token prediction.

        The weights make the loss sum a mean over taught tokens.

        example  a b c   ->   tokens a b, targets b c
        """
        lengths = np.diff(self.offsets)[ids] - 1
        offsets = offsets_of(lengths)
        at = spans(self.offsets[ids], lengths)
        taught = self.taught[at + 1]
        weights = (taught / max(1, np.count_nonzero(taught))).astype(np.float32)
        return DatumBatch(self.tokens[at], self.tokens[at + 1], offsets, {"weights": weights})


@dataclass(frozen=True, slots=True)
class Gate:
    """Problems that decide whether the base model is good enough, and how its answers are graded."""

    problems: Sequence[Problem]  # with prompts that already start the worked steps
    grade: Callable[[str, str], float]  # (completion, answer) -> grade
    tokenizer: PreTrainedTokenizerBase
    max_tokens: int  # per turn
    environment: Replies | None = None

    def accuracy(self, learner: Learner) -> float:
        """Return the mean grade of the greedy completions."""
        turns: list[list[str]] = [[] for _ in self.problems]
        open_prompts = {i: problem.prompt for i, problem in enumerate(self.problems)}
        for _ in range(self.environment.max_turns if self.environment else 1):
            texts = self._decode_turns(learner, list(open_prompts.values()))
            for (i, prompt), text in zip(list(open_prompts.items()), texts, strict=True):
                del open_prompts[i]
                turns[i].append(text)
                reply = self.environment.reply(turns[i], self.problems[i].answer) if self.environment else None
                if reply is not None:
                    open_prompts[i] = prompt + text + reply
            if not open_prompts:
                break
        pairs = zip(turns, self.problems, strict=True)
        return float(np.mean([self.grade("\n".join(texts), problem.answer) for texts, problem in pairs]))

    def _decode_turns(self, learner: Learner, prompts: Sequence[str]) -> list[str]:
        """Decode one turn per prompt greedily, up to the end of the first stop text."""
        encoded = [np.array(ids, np.int32) for ids in _encode(self.tokenizer, prompts)]
        stops = self.environment.stop if self.environment else ()
        stop_ids = self.tokenizer(list(stops), add_special_tokens=False)["input_ids"] if stops else []
        single = [ids[0] for ids in stop_ids if len(ids) == 1]  # a stop may be a special token
        ends = stop_conditions_of_tokenizer(self.tokenizer).ids
        completions = learner.greedy(encoded, self.max_tokens, [*ends, *single])
        texts = self.tokenizer.batch_decode(completions, skip_special_tokens=True)
        return [_up_to(text, stops) for text in texts]


@dataclass(frozen=True, slots=True)
class Replies:
    """Environment of a task, called in this process: a task with supervised examples is trusted."""

    reply: Callable[[Sequence[str], str], str | None]
    stop: Sequence[str]
    max_turns: int


@dataclass(frozen=True, slots=True)
class SupervisedResult:
    """Result of the supervised stage."""

    steps: int
    gate_accuracy: float
    loss: float  # of the last step, nats per token
    tokens: int  # predicted tokens of all steps
    seconds: float

    def metrics(self) -> dict[str, float]:
        """Return the result as metrics named "sft/..."."""
        return {f"sft/{name}": float(value) for name, value in asdict(self).items()}


def make_base(config: JobConfig, out: Path, on_step: OnStep) -> SupervisedResult:
    """Train the base model of ``model.make`` from scratch, and write it with its tokenizer to the new folder `out`.

    Raises:
        QualityError: the model did not pass the gate; `out` is not created.
        ConfigError: the task has no supervised examples, or an example is longer than ``model.max_length``.
    """
    make, seed = config.model.make, config.run.seed
    assert make is not None, "model.make is what this function makes"
    task = tasks.build(config.task, seed)
    if not isinstance(task, TeachableTask):
        raise ConfigError(
            f"model.make: task {config.task.name!r} has no supervised examples to train a base model on; set "
            "model.path instead"
        )
    section = make.supervised
    model_seed, example_seed, order_seed = map(int, np.random.SeedSequence(seed).generate_state(3))
    texts = task.supervised_examples(section.problems, section.worked_share, example_seed)
    tokenizer = build_tokenizer(["".join(parts) for parts in texts[:TOKENIZER_TEXTS]], make.vocab_size)
    examples = encode_examples(tokenizer, texts)
    longest = int(np.diff(examples.offsets).max())
    if longest > config.model.max_length:
        raise ConfigError(f"model.max_length: found {config.model.max_length}; wanted {longest}, the longest example")
    problems = [task.force_steps(problem) for problem in task.gate_problems(section.gate_problems)]
    environment = None
    if isinstance(task, ConversationTask):
        environment = Replies(task.reply, tuple(getattr(task, "stop", ())), config.turns.max_turns)
    gate = Gate(problems, task.grade, tokenizer, config.eval.max_tokens, environment)
    with new_folder(out) as folder:
        initial_model(make, tokenizer, config.model.max_length, model_seed, folder / "initial")
        learner = Learner(folder / "initial", config.model, config.learner, "all", OPTIMIZER)
        shutil.rmtree(folder / "initial")
        result = train_base(learner, examples, gate, section, order_seed, on_step)
        learner.save_model(folder)
        tokenizer.save_pretrained(folder)
    return result


def train_base(
    learner: Learner, examples: Examples, gate: Gate, section: SupervisedSection, seed: int, on_step: OnStep
) -> SupervisedResult:
    """Train all weights of `learner` until the gate is passed and the learning rate has decayed.

    Raises:
        QualityError: the gate is not passed within ``max_steps``, or fails again after the decay.
    """
    loss_fn = losses.resolve("cross_entropy")
    start, tokens, decay_from = time.perf_counter(), 0, None
    for step, ids in enumerate(Epochs(len(examples), section.batch_size, seed), start=1):
        step_start = time.perf_counter()
        rate = learning_rate(section, step, decay_from)
        batch = examples.batch(ids)
        loss = learner.forward_backward(BASE_RUN, batch, loss_fn, where="weighted").loss_sum
        learner.optim_step(BASE_RUN, AdamParams(rate, *BETAS, grad_clip_norm=GRAD_CLIP_NORM))
        tokens += len(batch.tokens)
        seconds = time.perf_counter() - step_start
        metrics = {"sft/loss": loss, "sft/learning_rate": rate, "sft/tokens_per_s": len(batch.tokens) / seconds}
        is_last = decay_from is not None and step == decay_from + section.decay_steps
        if is_last or (decay_from is None and _check_is_due(section, step)):
            accuracy = metrics["sft/gate_accuracy"] = gate.accuracy(learner)
            if accuracy >= section.gate_accuracy:
                decay_from = step if decay_from is None else decay_from
            elif is_last or step == section.max_steps:
                on_step(step, metrics)
                raise QualityError(_gate_message(section, step, accuracy, loss, is_last))
        on_step(step, metrics)
        if is_last:
            return SupervisedResult(step, accuracy, loss, tokens, time.perf_counter() - start)
    raise AssertionError("epochs never end")


def learning_rate(section: SupervisedSection, step: int, decay_from: int | None) -> float:
    """Return the learning rate of step 1, 2, ...; the decay starts after step `decay_from`, None: gate not passed."""
    warm = min(1.0, step / max(1, section.warmup_steps))
    decayed = 0.0 if decay_from is None else (step - decay_from) / section.decay_steps
    return section.learning_rate * warm * (1.0 - (1.0 - FINAL_SHARE) * decayed)


def encode_examples(tokenizer: PreTrainedTokenizerBase, texts: Sequence[tuple[str, ...]]) -> Examples:
    """Encode examples (prompt, answer) or (prompt, turn, reply, turn, ...), each followed by the EOS token.

    Each part is encoded separately, as during sampling.
    """
    counts = np.array([len(parts) for parts in texts])
    pieces = _encode(tokenizer, list(itertools.chain.from_iterable(texts)))
    ends = np.cumsum(counts) - 1
    for end in ends:
        pieces[end] = [*pieces[end], eos_id(tokenizer)]
    position = np.arange(len(pieces)) - np.repeat(ends + 1 - counts, counts)  # of a part within its example
    lengths = np.array([len(piece) for piece in pieces])
    tokens = np.fromiter(itertools.chain.from_iterable(pieces), np.int32, count=int(lengths.sum()))
    taught = np.repeat((position == 0) | (position % 2 == 1), lengths)
    return Examples(tokens, taught, offsets_of(lengths)[np.concatenate([[0], ends + 1])])


def _up_to(text: str, stops: Sequence[str]) -> str:
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    return text[: min(ends)] if ends else text


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Encode texts from data; they cannot produce special tokens."""
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    controls = control_tokens(tokenizer)
    for i, text in enumerate(texts):
        protected = controls.protect(text)
        if protected != text:
            ids[i] = controls.ids(protected)
    return ids


def _check_is_due(section: SupervisedSection, step: int) -> bool:
    after = step - section.first_check_step
    return step == section.max_steps or (after >= 0 and after % section.check_every_steps == 0)


def _gate_message(section: SupervisedSection, step: int, accuracy: float, loss: float, decayed: bool) -> str:
    when = "after the learning rate decay" if decayed else "at supervised.max_steps"
    return (
        "the supervised stage did not train a base model that can solve the task: greedy accuracy from prompts with "
        f"started steps is {accuracy:.3f} on {section.gate_problems} problems {when} (step {step}, loss {loss:.3f} "
        f"nats per token); wanted supervised.gate_accuracy {section.gate_accuracy}. RL on this base model may fail. "
        "Raise supervised.max_steps or the sizes in model.make, make the task easier "
        "(task.max_operations), or try another run.seed"
    )
