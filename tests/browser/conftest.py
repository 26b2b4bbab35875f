"""The system's Chromium, and a run to look at."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from playwright.sync_api import Browser

from benchmarks.report_pictures import CHROMIUM, chromium, find_chromium
from rlsys.config import TrackingSection
from rlsys.report.page import report_of
from rlsys.run_state.jsonl import RolloutRow, write_problems
from rlsys.tracking.system_metrics import SystemMetrics
from rlsys.tracking.tracker import Tracker

STEPS = 12
PIECES = ["12", "+", "30", "=", "calculate(12+30)", "42", "\n", "So ", "\\boxed{", "42", "}", "</span><b>bold</b>"]
REPLY = 5  # the piece that the environment wrote


@pytest.fixture(scope="package")  # its event loop would be in the way of other folders' tests
def browser() -> Iterator[Browser]:
    program = find_chromium()
    if program is None:
        pytest.skip(f"not run: the report in a browser; there is no Chromium here (looked for {', '.join(CHROMIUM)})")
    with chromium(program) as browser:
        yield browser


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run with everything that a page can show, lines that are too long for a phone included."""
    run_dir = tmp_path_factory.mktemp("runs") / "seen"
    random, system = np.random.default_rng(0), SystemMetrics(tmp_path_factory.getbasetemp())
    config = {"run": {"name": "seen" + "-and-named-at-length" * 6}, "rl": {"steps": STEPS}, "long": "x" * 500}
    with Tracker(run_dir, TrackingSection(wandb="disabled"), "seen", config, note=lambda text: None) as tracker:
        for step in range(0, 600, 10):
            tracker.log(step + 10, {"sft/loss": 5 * math.exp(-step / 200)})
        for step in range(STEPS + 1):
            if step % 4 == 0:
                accuracy = 0.3 + 0.05 * step
                facts = {"eval/accuracy": accuracy, "eval/accuracy_low": accuracy - 0.1}
                facts |= {"eval/accuracy_high": accuracy + 0.1, "time/eval_s": 1.5, "eval/mean_tokens": 20.0}
                for k in (1, 4, 16):
                    value = 1 - (1 - accuracy) ** k
                    facts |= {f"eval/pass_at_{k}": value, f"eval/pass_at_{k}_low": value - 0.05}
                    facts |= {f"eval/pass_at_{k}_high": value + 0.05}
                tracker.log(step, facts)
            if step:
                tracker.log(step, figures(step, random) | system.figures())
                tracker.groups(step, random.integers(0, 40, 8).tolist(), random.choice([0.0, 0.5, 1.0], 8).tolist())
                tracker.rollouts(step, [completion(step, reward, random) for reward in (0.0, 1.0)])
            if step in (0, STEPS):
                phase: Literal["before", "after"] = "before" if step == 0 else "after"
                row = RolloutRow(step, phase, "1 + 1 =", "y" * 400, "2", 0.0, None, 4, "length", 3, [], [], [], [])
                tracker.rollouts(step, [row])
    write_problems(
        run_dir, [f"What is {at} + {at}? " + "z" * 200 for at in range(50)], [str(2 * at) for at in range(50)]
    )
    (run_dir / "errors.log").write_text("ActorDiedError: " + "sampler 0 " * 60)
    return report_of(run_dir)


def figures(step: int, random: np.random.Generator) -> dict[str, float]:
    return {
        "reward/mean": 0.3 + 0.05 * step,
        "reward/std": 0.4,
        "reward/correct": 0.3 + 0.05 * step,
        "reward/format": 0.1,
        "reward/groups": 32,
        "reward/agreeing_groups": step,
        "policy/ratio_mean": 1.0001,
        "policy/ratio_max": 1.4,
        "policy/lag_mean": 0.7,
        "policy/lag_max": 2.0,
        "policy/clip_fraction": 0.01 * random.random(),
        "policy/grad_norm": float(random.lognormal(5)),
        "time/sample_s": 1.2,
        "time/learn_s": 0.4,
        "time/step_s": 1.6,
        "sampler/tokens_per_s": 1800 + 10 * step,
    }


def completion(step: int, reward: float, random: np.random.Generator) -> RolloutRow:
    pieces = PIECES * 10
    sampled = [at % len(PIECES) != REPLY for at in range(len(pieces))]
    return RolloutRow(
        step=step,
        phase="train",
        prompt="What is 12 + 30? " + "w" * 120,
        completion="".join(pieces),
        answer="42",
        reward=reward,
        advantage=reward - 0.5,
        tokens=len(pieces),
        stop_reason="stop",
        problem=step,
        pieces=pieces,
        advantages=[reward - 0.5 if written else 0.0 for written in sampled],
        ratios=[float(np.exp(random.normal(0, 0.1))) if written else None for written in sampled],
        sampled=sampled,
    )
