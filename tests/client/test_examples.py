"""Every example runs on the tiny model, and does what it is there for."""

from __future__ import annotations

import asyncio
import re

import numpy as np
import pytest

import rlsys
from examples import grpo, loss_functions, mint_pattern, pairwise_preference


def test_the_tutorial_on_loss_functions_runs_whole(
    service: rlsys.ServiceClient, base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asyncio.run(loss_functions.main(base))
    printed = capsys.readouterr().out
    print(printed)
    loss = {name: float(value) for name, value in re.findall(r"(\S.*?) loss:sum = (\S+)", printed)}
    # one datum at p: ratio r = exp(p + 1.5) on the completion, whose advantages are 1
    assert loss["importance_sampling"] <= 0 < loss["cross_entropy"]
    for name in ("ppo", "PPO (tight clip)", "PPO (wide clip)"):
        assert loss[name] >= loss["importance_sampling"] - 1e-4
    assert "'logprob_sq'" in printed and "'dpo_loss'" in printed and "TensorData(" in printed


def test_the_pattern_of_mint_runs(service: rlsys.ServiceClient, base: str, capsys: pytest.CaptureFixture[str]) -> None:
    mint_pattern.main(base)
    assert re.findall(r"(SFT|PPO) loss: -?\d+\.\d{4}", capsys.readouterr().out) == ["SFT", "PPO"]


def test_pairs_are_told_apart_after_training_on_them(service: rlsys.ServiceClient, base: str) -> None:
    history = pairwise_preference.main(base, steps=12)
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert history[-1]["pair_accuracy"] == 1.0 and history[-1]["mean_margin"] > history[0]["mean_margin"]


def test_grpo_raises_the_reward(service: rlsys.ServiceClient, base: str, capsys: pytest.CaptureFixture[str]) -> None:
    history = grpo.main(base, steps=10)
    assert np.mean(history[-3:]) > np.mean(history[:3]) + 0.05
    ratios = [float(value) for value in re.findall(r"ratio (\S+)", capsys.readouterr().out)]
    assert len(ratios) == 10 and max(abs(ratio - 1) for ratio in ratios) < 1e-3  # on policy, so p = q
