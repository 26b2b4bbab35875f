"""Claims about the stage that makes a base model from scratch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlsys import tasks
from rlsys.bootstrap.bpe_tokenizer import build_tokenizer
from rlsys.bootstrap.supervised import Examples, Gate, Replies, encode_examples, learning_rate, make_base, train_base
from rlsys.config import JobConfig, LearnerSection, MakeSection, ModelSection, SupervisedSection, TaskSection
from rlsys.data.problems import Problem
from rlsys.errors import ConfigError, QualityError
from rlsys.learner.learner import Learner
from rlsys.modeling.base_model import initial_model
from rlsys.tasks import TeachableTask
from rlsys.utils.packed_folder import pack_folder

MICRO: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 16,
    "num_layers": 1,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 32,
    "intermediate_size": 24,
}
TASK = tasks.build(TaskSection(train_problems=8, eval_problems=8), 0)
assert isinstance(TASK, TeachableTask)
PAIRS = TASK.supervised_examples(200, 0.5, 0)
TOKENIZER = build_tokenizer([prompt + answer for prompt, answer in PAIRS], 160)
EXAMPLES = encode_examples(TOKENIZER, PAIRS)
GATE = Gate([TASK.force_steps(problem) for problem in TASK.gate_problems(4)], TASK.grade, TOKENIZER, 8)


def ignore(step: int, metrics: Mapping[str, float]) -> None:
    pass


@pytest.fixture
def learner(tmp_path: Path) -> Learner:
    make = MakeSection(**MICRO)
    initial_model(make, TOKENIZER, 128, 0, tmp_path / "base")
    return Learner(tmp_path / "base", ModelSection(make=make), LearnerSection(), "all", "muon")


def job(seed: int = 0, **supervised: Any) -> JobConfig:
    short = {"problems": 64, "batch_size": 8, "first_check_step": 1, "gate_accuracy": 0.0, "gate_problems": 4}
    section = {**short, "decay_steps": 2, **supervised}
    return JobConfig.model_validate(
        {
            "run": {"name": "test", "seed": seed},
            "model": {"make": {**MICRO, "supervised": section}},
            "task": {"train_problems": 8, "eval_problems": 8},
            "eval": {"max_tokens": 8},
        }
    )


def test_a_few_steps_lower_the_loss(learner: Learner) -> None:
    seen: list[float] = []
    section = SupervisedSection(batch_size=16, warmup_steps=5, first_check_step=20, gate_accuracy=0, decay_steps=20)
    result = train_base(learner, EXAMPLES, GATE, section, 0, lambda step, metrics: seen.append(metrics["sft/loss"]))
    assert len(seen) == result.steps == 40
    assert seen[0] == pytest.approx(np.log(len(TOKENIZER)), rel=0.02)  # a random model knows nothing
    assert np.mean(seen[-5:]) < seen[0] - 1.0
    assert result.loss == seen[-1]


def test_every_step_reports_and_the_gate_is_reported_where_it_was_measured(learner: Learner) -> None:
    seen: dict[int, Mapping[str, float]] = {}
    section = SupervisedSection(
        batch_size=4, warmup_steps=0, first_check_step=3, check_every_steps=2, gate_accuracy=0, decay_steps=4
    )
    result = train_base(learner, EXAMPLES, GATE, section, 0, seen.__setitem__)
    every = {"sft/loss", "sft/learning_rate", "sft/tokens_per_s"}
    assert list(seen) == [1, 2, 3, 4, 5, 6, 7]
    assert [step for step, metrics in seen.items() if "sft/gate_accuracy" in metrics] == [3, 7]
    assert all(metrics.keys() - {"sft/gate_accuracy"} == every for metrics in seen.values())
    assert [seen[step]["sft/learning_rate"] for step in (3, 4, 7)] == pytest.approx([4e-3, 4e-3 * 0.76, 4e-3 * 0.04])
    assert set(result.metrics()) == {"sft/steps", "sft/gate_accuracy", "sft/loss", "sft/tokens", "sft/seconds"}


def test_a_gate_that_is_not_passed_stops_with_the_numbers_and_the_way_out(learner: Learner) -> None:
    seen: list[int] = []
    section = SupervisedSection(batch_size=4, first_check_step=2, check_every_steps=2, gate_accuracy=1, max_steps=5)
    with pytest.raises(QualityError, match=r"0\.000 on 60 problems .*step 5.*gate_accuracy 1\.0.*max_steps"):
        train_base(learner, EXAMPLES, GATE, section, 0, lambda step, metrics: seen.append(step))
    assert seen == [1, 2, 3, 4, 5]


def test_a_gate_that_is_lost_during_the_decay_stops_too(learner: Learner) -> None:
    grades = iter([1.0] * 4 + [0.0] * 4)
    fading = Gate(GATE.problems, lambda completion, answer: next(grades), TOKENIZER, 4)
    section = SupervisedSection(batch_size=4, first_check_step=1, decay_steps=2)
    with pytest.raises(QualityError, match="after the learning rate decay"):
        train_base(learner, EXAMPLES, fading, section, 0, ignore)


def test_the_learning_rate_warms_up_stays_and_falls_to_a_25th() -> None:
    section = SupervisedSection(learning_rate=1.0, warmup_steps=4, decay_steps=10)
    assert [learning_rate(section, step, None) for step in (1, 2, 4, 5, 900)] == [0.25, 0.5, 1, 1, 1]
    falling = [learning_rate(section, step, 100) for step in range(100, 111)]
    assert falling == pytest.approx(np.linspace(1.0, 0.04, 11))


def test_no_warm_up_begins_at_the_full_rate() -> None:
    assert learning_rate(SupervisedSection(learning_rate=1.0, warmup_steps=0), 1, None) == 1.0


def test_a_batch_predicts_every_next_token_within_an_example_and_none_across() -> None:
    tokens = np.array([1, 2, 3, 7, 8, 4, 5, 6, 9], np.int32)
    examples = Examples(tokens, np.ones(9, np.bool_), np.array([0, 3, 5, 9]))
    batch = examples.batch(np.array([2, 0]))
    assert batch.tokens.tolist() == [4, 5, 6, 1, 2]
    assert batch.targets.tolist() == [5, 6, 9, 2, 3]
    assert batch.offsets.tolist() == [0, 3, 5]
    assert batch.columns["weights"] == pytest.approx([0.2] * 5)


def test_an_example_is_prompt_answer_and_end_each_encoded_by_itself() -> None:
    for (prompt, answer), start, stop in zip(PAIRS, EXAMPLES.offsets, EXAMPLES.offsets[1:], strict=False):
        expected = TOKENIZER.encode(prompt) + TOKENIZER.encode(answer) + [TOKENIZER.eos_token_id]
        assert EXAMPLES.tokens[start:stop].tolist() == expected
    assert len(EXAMPLES) == len(PAIRS)
    assert EXAMPLES.taught.all()


def test_replies_are_read_and_not_learned() -> None:
    examples = encode_examples(TOKENIZER, [("1+2\n", "3+4", "=7\n", "7"), ("5\n", "6")])
    end = TOKENIZER.eos_token_id
    first, second = TOKENIZER.encode("1+2\n3+4=7\n7"), TOKENIZER.encode("5\n6")  # no token spans two of these parts
    assert examples.tokens.tolist() == [*first, end, *second, end]
    assert examples.taught.tolist() == [True] * 4 + [True] * 3 + [False] * 3 + [True] * 2 + [True] * 4
    batch = examples.batch(np.array([0, 1]))
    weights = batch.columns["weights"]
    assert (weights == 0).tolist() == [False] * 6 + [True] * 3 + [False] * 5  # shifted: a position predicts the next
    assert weights.sum() == pytest.approx(1.0)


def test_the_gate_lets_the_environment_answer_until_it_has_nothing_to_say(learner: Learner) -> None:
    """The model is taught turns that lead to the answer, and never the replies between them."""
    section = SupervisedSection(
        batch_size=2, warmup_steps=0, learning_rate=0.02, first_check_step=80, gate_accuracy=0, decay_steps=10
    )
    texts = [("1\n", "7;", "=5\n", "8;", "=6\n", "9"), ("2\n", "3;", "=4\n", "2;", "=1\n", "5")]
    said: list[list[str]] = []

    def reply(turns: Sequence[str], answer: str) -> str | None:
        said.append(list(turns))
        of = {"7;": "=5\n", "8;": "=6\n", "3;": "=4\n", "2;": "=1\n"}
        return of.get(turns[-1])

    problems = [Problem("1\n", "7;\n8;\n9"), Problem("2\n", "3;\n2;\n5")]
    gate = Gate(problems, lambda said, answer: float(said == answer), TOKENIZER, 6, Replies(reply, (";",), 5))
    train_base(learner, encode_examples(TOKENIZER, texts), gate, section, 0, ignore)
    said.clear()
    assert gate.accuracy(learner) == 1.0
    assert ["7;", "8;", "9"] in said and ["3;", "2;", "5"] in said
    short = replace(gate, environment=Replies(reply, (";",), 2))
    assert short.accuracy(learner) == 0.0


def test_the_gate_grades_each_problems_own_completion_against_its_own_answer(learner: Learner) -> None:
    section = SupervisedSection(
        batch_size=2, warmup_steps=0, learning_rate=0.02, first_check_step=60, gate_accuracy=0, decay_steps=10
    )
    pairs = [("1\n", "7"), ("2\n", "8")]
    problems = [Problem(prompt, answer) for prompt, answer in pairs]
    own = Gate(problems, lambda completion, answer: float(completion == answer), TOKENIZER, 2)
    crossed = Gate([Problem("1\n", "8"), Problem("2\n", "7")], own.grade, TOKENIZER, 2)
    train_base(learner, encode_examples(TOKENIZER, pairs), own, section, 0, ignore)
    assert own.accuracy(learner) == 1.0
    assert crossed.accuracy(learner) == 0.0


def test_the_same_seed_makes_the_same_base_and_another_does_not(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "two", "other")]
    for folder, seed in zip(folders, (3, 3, 4), strict=True):
        make_base(job(seed), folder, ignore)
    one, two, other = map(pack_folder, folders)
    assert one == two
    assert one["model.safetensors"] != other["model.safetensors"]


def test_the_base_is_a_whole_hugging_face_folder_with_trained_weights(tmp_path: Path) -> None:
    out = tmp_path / "base"
    make_base(job(), out, ignore)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert (model.model.norm.weight != 1).any()
    assert [path.name for path in tmp_path.iterdir()] == ["base"]  # no rubbish beside it
    assert all(path.is_file() for path in out.iterdir())


def test_a_base_that_is_not_good_enough_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(QualityError):
        make_base(job(gate_accuracy=1.0, max_steps=2), tmp_path / "base", ignore)
    assert list(tmp_path.iterdir()) == []


def test_an_example_that_does_not_fit_the_model_is_refused_with_the_length_needed(tmp_path: Path) -> None:
    config = job()
    tight = config.model_copy(update={"model": config.model.model_copy(update={"max_length": 20})})
    with pytest.raises(ConfigError, match=r"max_length: found 20; wanted \d+, the longest example"):
        make_base(tight, tmp_path / "base", ignore)
