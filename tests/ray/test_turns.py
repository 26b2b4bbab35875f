"""Jobs whose environment answers: what it says is read by the model, and never learned from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from actors import job as jobs
from rlsys.config import JobConfig, load_config, parse_config
from rlsys.errors import GradingError
from rlsys.rollouts import ENVIRONMENT
from rlsys.run_state.jsonl import read_metrics
from rlsys.run_state.saved_rollouts import SavedStep, load_step
from rlsys.tracking.progress import Progress
from tests.ray.conftest import JOB

Job = Callable[..., JobConfig]
TASK = ["task.name=tests.ray.conversations:Interrupter", "rl.sampling.max_tokens=32", "eval.max_tokens=32"]


@pytest.fixture(scope="module")
def finished(ray_cluster: str, micro_base: Path, tmp_path_factory: pytest.TempPathFactory) -> JobConfig:
    """With a KL term every group is learned from, and every token has a reference."""
    own = [f"model.path={micro_base}", f"run.dir={tmp_path_factory.mktemp('runs')}"]
    config = parse_config(JOB, [*own, *TASK, "rl.steps=3", "rl.advantages.kl_coef=0.02"])
    jobs.train(config, Progress())
    return config


def steps(config: JobConfig) -> list[SavedStep]:
    return [load_step(config.run_dir, step) for step in (1, 2, 3)]


def lines(config: JobConfig) -> list[dict[str, float]]:
    return [line for line in read_metrics(config.run_dir) if "reward/mean" in line]


def test_replies_stand_where_the_turns_before_them_end_and_say_what_the_environment_said(
    finished: JobConfig, micro_base: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(micro_base)
    seen = 0
    for recorded in steps(finished):
        rollouts = recorded.rollouts
        assert not rollouts.logprobs[rollouts.versions == ENVIRONMENT].any()
        for r in range(len(rollouts.group)):
            rows = slice(rollouts.offsets[r], rollouts.offsets[r + 1])
            replied = rollouts.versions[rows] == ENVIRONMENT
            said = tokenizer.decode(rollouts.completion(r)[replied]).split("\n")[:-1]
            assert [text.partition("+")[0] for text in said] == [f"={turn + 1}" for turn in range(len(said))]
            seen += len(said)
            before = rollouts.completion(r)[:-1][np.diff(replied.astype(int)) == 1]
            ends = [tokenizer.decode([token]) for token in before]
            assert all(
                token == tokenizer.eos_token_id or any(map(str.isalpha, text))
                for token, text in zip(before, ends, strict=True)
            )
            assert not replied[-1:].any() and len(replied) <= 32
    assert seen > 50


def test_no_token_of_a_reply_is_learned_from(finished: JobConfig) -> None:
    for recorded, line in zip(steps(finished), lines(finished), strict=True):
        rollouts = recorded.rollouts
        assert 0 < np.count_nonzero(rollouts.sampled) < len(rollouts.tokens)
        assert line["policy/tokens"] == np.count_nonzero(rollouts.sampled)


def test_learner_and_sampler_agree_on_every_turn_also_after_replies(finished: JobConfig) -> None:
    assert all(line["policy/logprob_diff_max"] < 1e-3 for line in lines(finished))
    assert all(abs(line["policy/ratio_mean"] - 1) < 1e-3 for line in lines(finished))


def test_turns_and_failures_are_among_the_metrics_and_the_policy_moves(finished: JobConfig) -> None:
    assert all(line["sampler/turns_mean"] > 1.5 for line in lines(finished))
    assert all(line["sampler/reply_timeouts"] == line["sampler/reply_errors"] == 0 for line in lines(finished))
    assert [line["policy/version"] for line in lines(finished)] == [1, 2, 3]
    assert all(line["policy/grad_norm"] > 0 for line in lines(finished))


@pytest.mark.soak
def test_an_environment_that_fails_stops_the_run_with_its_cause(ray_cluster: str, job: Job) -> None:
    broken = job(*TASK, "task.name=tests.ray.conversations:Broken", "rl.steps=1")
    with pytest.raises(GradingError, match=r"(?s)completions were cut short.*RuntimeError: the dice are gone"):
        jobs.train(broken, Progress())


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_a_model_learns_to_ask_the_calculator(ray_cluster: str, tmp_path: Path) -> None:
    config = load_config("configs/calculator.yaml", [f"run.dir={tmp_path}", "tracking.wandb=disabled"])
    outcome = jobs.train(config, Progress())
    turns = [line["sampler/turns_mean"] for line in lines(config)]
    assert outcome.accuracy_before < 0.3 and outcome.accuracy_after > 0.85
    assert turns[0] < 1.6 and turns[-1] > 2.2
    assert all(line["policy/logprob_diff_max"] < 1e-3 for line in lines(config))
