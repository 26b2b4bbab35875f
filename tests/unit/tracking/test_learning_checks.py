"""Claims about the signs of a run that cannot learn: told once, with the share and the key, and at the report's top."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from rlsys.config import TrackingSection, keys
from rlsys.report.page import write_report
from rlsys.run_state.jsonl import read_metrics
from rlsys.tracking.learning_checks import CHECKS, LearningChecks, learning_warnings
from rlsys.tracking.tracker import Tracker

CONFIG: dict[str, Any] = {
    "run": {"name": "seen"},
    "model": {"max_length": 128},
    "rl": {"steps": 20, "samples_per_problem": 8, "sampling": {"max_tokens": 48, "temperature": 1.0}},
    "eval": {"max_tokens": 32},
}
HEALTHY: dict[str, float] = {
    "sampler/completions": 64.0,
    "sampler/truncated_share": 0.1,
    "sampler/completion_tokens_mean": 20.0,
    "sampler/reply_timeouts": 0.0,
    "sampler/reply_errors": 1.0,
    "sampler/out_of_turns": 3.0,
    "reward/mean": 0.4,
    "reward/std": 0.49,
    "reward/completions": 64.0,
    "reward/wrong": 38.0,
    "reward/timeouts": 0.0,
    "reward/errors": 0.0,
    "reward/groups": 8.0,
    "reward/agreeing_groups": 3.0,
    "policy/tokens": 900.0,
    "policy/grad_norm": 0.02,
    "policy/learning_rate": 1e-4,
    "policy/clip_fraction": 0.05,
    "advantages/mean_abs": 0.3,
    "task/train_problems": 100.0,
    "task/train_dropped": 3.0,
    "eval/truncated_share": 0.2,
}
# fault -> (figures that it changes, what the sentence has to say)
AGREED = {"reward/agreeing_groups": 8.0, "policy/tokens": 0.0, "advantages/mean_abs": 0.0}
FAULTS: dict[str, tuple[dict[str, float], list[str]]] = {
    "cut off": ({"sampler/truncated_share": 0.97}, ["97 % of the completions", "rl.sampling.max_tokens (now 48)"]),
    "every group agrees": (AGREED, ["all groups", "rl.samples_per_problem (now 8)"]),
    "almost every group agrees": (
        {"reward/groups": 100.0, "reward/agreeing_groups": 96.0},
        ["96 % of the groups", "rl.sampling.temperature (now 1.0)"],
    ),
    "no answer is found": (
        {**AGREED, "reward/mean": 0.0, "reward/std": 0.0, "reward/wrong": 64.0},
        ["same reward, 0", "No completion counts as right", "task.columns.answer"],
    ),
    "all right": ({**AGREED, "reward/mean": 1.0, "reward/std": 0.0, "reward/wrong": 0.0}, ["too easy"]),
    "a constant reward": (
        {**AGREED, "reward/mean": 0.5, "reward/std": 0.0, "reward/wrong": 20.0},
        ["same reward, 0.5", "rewards.function"],
    ),
    "graders fail": ({"reward/errors": 40.0, "reward/timeouts": 24.0}, ["all grades failed", "rewards.timeout_s"]),
    "replies fail": ({"sampler/reply_errors": 63.0}, ["98.4 % of the", "turns.reply_timeout_s"]),
    "turns run out": ({"sampler/out_of_turns": 64.0}, ["all completions", "turns.max_turns"]),
    "empty": ({"sampler/completion_tokens_mean": 1.0}, ["1 tokens on average", "prompt.template"]),
    "all left out": ({"policy/tokens": 0.0}, ["no token is trained on", "rl.advantages.drop_agreeing"]),
    "learning rate 0": ({"policy/learning_rate": 0.0}, ["rl.optim.learning_rate"]),
    "gradient 0": ({"policy/grad_norm": 0.0}, ["gradient of 900 tokens is 0", "rl.loss"]),
    "gradient no number": ({"policy/grad_norm": float("nan")}, ["gradient of 900 tokens is 0"]),
    "all clipped": ({"policy/clip_fraction": 1.0}, ["all tokens", "rl.loss.params"]),
    "long prompts": ({"task/train_dropped": 900.0}, ["90 % of the training problems", "prompt.max_tokens"]),
    "wrong columns": ({"task/train_unusable": 300.0}, ["75 % of the rows", "task.columns"]),
    "evaluation cut off": ({"eval/truncated_share": 1.0}, ["all completions of the evaluation", "(now 32)"]),
}


def told(metrics: dict[str, float], steps: int = 10, config: dict[str, Any] = CONFIG) -> list[str]:
    checks = LearningChecks(config)
    return [text for step in range(1, steps + 1) for text in checks.see(step, metrics)]


def test_a_run_that_learns_is_told_nothing() -> None:
    assert told(HEALTHY) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_that_cannot_learn_is_told_once_with_the_share_and_the_key(fault: str) -> None:
    changed, words = FAULTS[fault]
    found = told({**HEALTHY, **changed})
    assert len(found) == 1
    assert all(word in found[0] for word in words), found


def test_keys_that_are_named_are_keys_of_a_job() -> None:
    known = set(keys())
    said = [text for changed, _ in FAULTS.values() for text in told({**HEALTHY, **changed})]
    said += told({**HEALTHY, "policy/tokens": 0.0}, config={"rl": {"overlong": {"handling": "mask"}}})
    named = {key for text in said for key in re.findall(r"\b[a-z]+(?:\.[a-z_]+)+", text)}
    sections = {"report.html", "errors.log", "docs/tokenizers.md", "tokenizers.md"}
    missing = {key for key in named - sections if not any(one == key or one.startswith(f"{key}.") for one in known)}
    assert missing == set()


def test_a_step_or_two_may_be_chance() -> None:
    checks, cut = LearningChecks(CONFIG), {**HEALTHY, "sampler/truncated_share": 1.0}
    assert [checks.see(step, metrics) for step, metrics in enumerate((cut, cut, HEALTHY, cut, cut), 1)] == [[]] * 5
    assert checks.signs() == []


def test_a_run_of_two_steps_is_told_after_both() -> None:
    cut = {**HEALTHY, "sampler/truncated_share": 1.0}
    assert len(told(cut, 2, {"rl": {"steps": 2}})) == 1
    assert told(cut, 2) == []


def test_what_follows_from_a_cause_is_not_told_beside_it() -> None:
    nothing = {**HEALTHY, **AGREED, "reward/std": 0.0, "reward/errors": 64.0}
    assert len(told(nothing)) == 1 and "rewards.timeout_s" in told(nothing)[0]


def test_a_masked_batch_names_the_mask() -> None:
    config = {"rl": {"overlong": {"handling": "mask"}, "sampling": {"max_tokens": 48}}}
    found = told({**HEALTHY, "policy/tokens": 0.0, "sampler/truncated_share": 0.5}, config=config)
    assert len(found) == 1 and "rl.overlong.handling mask" in found[0]


def test_without_a_baseline_groups_that_agree_on_a_reward_teach() -> None:
    config = {"rl": {"advantages": {"baseline": "none"}}}
    assert told({**HEALTHY, "reward/agreeing_groups": 8.0}, config=config) == []


def test_steps_that_are_done_again_count_once_and_are_not_told_again() -> None:
    checks, cut = LearningChecks(CONFIG), {**HEALTHY, "sampler/truncated_share": 1.0}
    assert [len(checks.see(step, cut)) for step in (1, 2)] == [0, 0]
    checks.roll_back(1)
    assert [len(checks.see(step, cut)) for step in (2, 3, 4)] == [0, 1, 0]
    checks.roll_back(1)
    assert checks.signs()[0].steps == (1,)
    assert [len(checks.see(step, cut)) for step in (2, 3, 4)] == [0, 0, 0]


def test_every_check_has_a_fault_here() -> None:
    found = {
        sign.name
        for changed, _ in FAULTS.values()
        for sign in learning_warnings(_records({**HEALTHY, **changed}), CONFIG)
    }
    held_out = learning_warnings(_records({**HEALTHY, "task/train_held_out": 300.0}), CONFIG)
    assert found | {sign.name for sign in held_out} == {check.name for check in CHECKS}


def _records(metrics: dict[str, float]) -> list[dict[str, Any]]:
    return [{"step": step, "time": 0.0, "stage": "rl", "row": step, **metrics} for step in (1, 2, 3)]


def _written(folder: Path, metrics: dict[str, float], steps: int) -> str:
    with Tracker(folder, TrackingSection(wandb="disabled"), "seen", CONFIG, note=lambda text: None) as tracker:
        tracker.log(1, {"sft/loss": 2.0})
        for step in range(1, steps + 1):
            tracker.log(step, metrics)
    return write_report(folder).read_text("utf-8")


def test_the_report_begins_with_what_keeps_the_run_from_learning(tmp_path: Path) -> None:
    page = _written(tmp_path, {**HEALTHY, "sampler/truncated_share": 1.0}, 12)
    sign = page.index("rl.sampling.max_tokens (now 48)")
    assert sign < page.index("card hero") and "(steps 1 to 12)" in page
    assert len(learning_warnings(read_metrics(tmp_path), CONFIG)) == 1


def test_the_report_of_a_run_that_learns_says_nothing_of_it(tmp_path: Path) -> None:
    assert "may not learn" not in _written(tmp_path, HEALTHY, 12)
