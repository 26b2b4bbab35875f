"""tinker-cookbook's own programs, with their command lines alone, against one server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.serve import clients
from tests.serve.clients import COOKBOOK, Server
from tests.serve.offline import prepare

# The learner's log-probabilities against those of the sampler that drew the tokens.
AGREE = 1e-4
SMALL = {"lora_rank": 8, "max_tokens": 10, "group_size": 8}
ARITHMETIC: dict[str, Any] = {**SMALL, "groups_per_batch": 4, "renderer_name": "role_colon", "learning_rate": 1e-2}


def soak(*losses: str) -> list[Any]:
    """Losses whose values test_sdk.py compares with their formulas in each run of the tests."""
    return [pytest.param(each, marks=pytest.mark.soak) for each in losses]


@pytest.fixture
def folder(server: Server, tmp_path: Path) -> Path:
    prepare(tmp_path, server.model, server.alias)
    return tmp_path


def recipe(
    server: Server, folder: Path, module: str, log: str, *arguments: str, **settings: Any
) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl after `python -m tinker_cookbook.MODULE key=value ...`."""
    given = [f"{key}={value}" for key, value in {"log_path": folder / log, **settings}.items()]
    return rows(server, folder, ["-m", f"tinker_cookbook.{module}", *given, *arguments], folder / log)


def rows(server: Server, folder: Path, command: list[str], log: Path) -> list[dict[str, Any]]:
    hub = {"HF_HOME": str(folder), "HF_HUB_CACHE": str(folder / "hub")}
    done = clients.run(server, COOKBOOK, command, folder, **hub)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-5000:]}"
    return read(log / "metrics.jsonl")


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def values(found: list[dict[str, Any]], key: str) -> list[float]:
    return [row[key] for row in found if key in row]


def agrees(found: list[dict[str, Any]], steps: int) -> None:
    gaps = values(found, "optim/kl_sample_train_v1")
    assert len(gaps) == steps, f"{len(gaps)} of {steps} steps have the metric: {found}"
    assert max(map(abs, gaps)) < AGREE, gaps


@pytest.mark.parametrize("loss", ["importance_sampling", *soak("cispo", "gspo")])
def test_rl_loop_finds_the_answer_that_is_rewarded(loss: str, server: Server, folder: Path) -> None:
    found = recipe(
        server,
        folder,
        "recipes.rl_loop",
        loss,
        **SMALL | {"group_size": 16},
        model_name=server.alias,
        batch_size=4,
        learning_rate=4e-3,
        loss_fn=loss,
        save_every=0,
        max_steps=6,
    )
    rewards = values(found, "reward/total")
    assert len(rewards) == 6
    assert sum(rewards[-2:]) / 2 > rewards[0] + 0.2, rewards


def test_sl_loop_resumes_where_it_was_stopped_with_the_state_it_had(server: Server, folder: Path) -> None:
    settings = {"model_name": server.alias, "batch_size": 4, "lora_rank": 8, "max_length": 200, "learning_rate": 1e-2}
    first = recipe(server, folder, "recipes.sl_loop", "run", **settings, save_every=1, max_steps=3)
    losses = values(first, "train_mean_nll")
    assert len(losses) == 3 and losses[2] < losses[0], losses
    saved = read(folder / "run" / "checkpoints.jsonl")
    assert [each["name"] for each in saved] == ["000001", "000002", "final"]
    # As a run is left that was stopped in its third step: its last checkpoint is that before the step.
    (folder / "run" / "checkpoints.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in saved[:2]))
    both = recipe(server, folder, "recipes.sl_loop", "run", **settings, save_every=1, max_steps=4)
    again = {row["step"]: row["train_mean_nll"] for row in both[len(first) :] if "train_mean_nll" in row}
    assert sorted(again) == [2, 3]
    assert again[2] == pytest.approx(losses[2], abs=1e-5)
    assert again[3] < losses[0]


@pytest.mark.parametrize("loss", ["ppo", *soak("importance_sampling", "cispo", "dro")])
def test_math_rl_in_turns(loss: str, server: Server, folder: Path) -> None:
    steps = 5 if loss == "ppo" else 2
    found = recipe(
        server,
        folder,
        "recipes.math_rl.train",
        "sync",
        **ARITHMETIC,
        model_name=server.model,
        loss_fn=loss,
        max_steps=steps,
        save_every=2,
        compute_post_kl=True,
        behavior_if_log_dir_exists="delete",
    )
    agrees(found, steps)
    if loss == "ppo":
        formed = values(found, "env/all/format")
        # draws have no seed, and steps this large were seen to lose the form again and to find it once more
        assert max(formed[1:]) > formed[0] + 0.2, formed


def test_math_rl_off_policy_samples_while_it_trains_in_substeps(server: Server, folder: Path) -> None:
    found = recipe(
        server,
        folder,
        "recipes.math_rl.train",
        "async",
        **ARITHMETIC | {"learning_rate": 2e-3},
        model_name=server.model,
        loss_fn="ppo",
        max_steps=4,
        max_steps_off_policy=1,
        num_substeps=2,
        save_every=2,
        behavior_if_log_dir_exists="delete",
    )
    gaps = values(found, "optim/kl_sample_train_v2")
    assert len(gaps) == 4
    assert 1e-6 < max(gaps) < 0.5, gaps  # of policies that are at most three updates older; on policy it is 1e-9


def test_math_rl_trains_on_minibatches_as_they_come(server: Server, folder: Path) -> None:
    found = recipe(
        server,
        folder,
        "recipes.math_rl.train",
        "stream",
        "stream_minibatch_config=StreamMinibatchConfig",
        "stream_minibatch_config.groups_per_batch=4",
        "stream_minibatch_config.num_minibatches=2",
        **ARITHMETIC,
        model_name=server.model,
        loss_fn="ppo",
        max_steps=3,
        behavior_if_log_dir_exists="delete",
    )
    agrees(found, 3)


def test_rl_train_takes_a_penalty_against_a_reference(server: Server, folder: Path) -> None:
    log = folder / "penalty"
    settings = {
        **SMALL,
        "batch_size": 4,
        "renderer_name": "role_colon",
        "learning_rate": 1e-2,
        "model_name": server.model,
        "loss_fn": "importance_sampling",
        "kl_penalty_coef": 0.1,
        "kl_reference_config": {"base_model": server.model},
        "max_steps": 3,
        "log_path": str(log),
        "rolling_save_every": 1,
    }
    found = rows(server, folder, ["-m", "tests.serve.programs.cookbook_rl", json.dumps(settings)], log)
    agrees(found, 3)
    apart = values(found, "kl_policy_base")
    assert len(apart) == 3 and abs(apart[0]) < AGREE, apart  # a fresh adapter is the base
    assert max(map(abs, apart[1:])) > 1e-3, apart


def test_dpo_prefers_what_was_chosen(server: Server, folder: Path) -> None:
    found = recipe(
        server,
        folder,
        "recipes.preference.dpo.train",
        "dpo",
        model_name=server.alias,
        dataset="hhh",
        batch_size=4,
        max_length=200,
        learning_rate=1e-2,
        max_steps=4,
        behavior_if_log_dir_exists="delete",
    )
    margins, losses = values(found, "margin"), values(found, "dpo_loss")
    assert len(losses) == 4
    assert losses[0] == pytest.approx(0.6931, abs=1e-3), losses  # log 2: the policy is its reference
    assert margins[-1] > margins[0] and losses[-1] < losses[0], (margins, losses)
