"""A step is computed again from what its run has kept, to the bit, and whatever was changed since then is noticed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from actors.cli import app
from rlsys.advantages import to_minibatches
from rlsys.config import JobConfig, parse_config
from rlsys.data.problems import Epochs
from rlsys.errors import CheckpointError, ConfigError
from rlsys.learner.policy import Policy, join_prompts
from rlsys.metrics import reduce_metrics
from rlsys.replay.replay_step import ALWAYS, TOLERANCE, replay, replayable
from rlsys.rollouts import ENVIRONMENT, Rollouts, concatenate, offsets_of
from rlsys.run_state.ledger import TRAINED, Ledger
from rlsys.run_state.run_dir import RunStore
from rlsys.run_state.saved_rollouts import STEPS, SavedStep, load_step, save_step
from rlsys.tracking.tracker import Tracker
from tests.unit.tiny_learner import LENDER, lend_for

STEP_COUNT, PROBLEMS, SAMPLES = 4, 4, 4


def job(base: Path, folder: Path, *overrides: str) -> JobConfig:
    text = f"""
    run: {{name: kept, dir: {folder}}}
    model: {{path: {base}, max_length: 64}}
    task: {{train_problems: 40}}
    lora: {{rank: 4}}
    checkpoint: {{keep: 9}}
    rl:
      steps: {STEP_COUNT}
      problems_per_step: {PROBLEMS}
      samples_per_problem: {SAMPLES}
      sampling: {{temperature: 0.8, max_tokens: 16}}
      optim: {{learning_rate: 1.0e-2, warmup_steps: 0, weight_decay: 0.1}}
    eval: {{max_tokens: 16}}
    tracking: {{wandb: disabled}}
    """
    return parse_config(text, overrides)


def sample(policy: Policy, problems: int, seed: tuple[int, ...], lag: int) -> Rollouts:
    """Random completions under the policy's own log-probabilities, which an engine computes with other roundings; those
    of an older version, and what an environment has put in between, further off."""
    random = np.random.default_rng(seed)
    R = problems * SAMPLES
    prompt_offsets, offsets = offsets_of(random.integers(2, 8, problems)), offsets_of(random.integers(1, 12, R))
    T = int(offsets[-1])
    newest = policy.learner.runs.version(policy.run_id)
    lag = min(lag, newest)
    drawn = Rollouts(
        problems=random.integers(0, 40, problems),
        prompt_tokens=random.integers(1, 64, prompt_offsets[-1]).astype(np.int32),
        prompt_offsets=prompt_offsets,
        group=np.repeat(np.arange(problems), SAMPLES).astype(np.int32),
        tokens=random.integers(1, 64, T).astype(np.int32),
        logprobs=np.zeros(T, np.float32),
        versions=np.where(random.random(T) < 0.1, ENVIRONMENT, newest - lag).astype(np.int32),
        offsets=offsets,
        stop_reasons=random.integers(0, 2, R).astype(np.int8),
    )
    tokens, whole, sampled = join_prompts(drawn)
    p_T = policy.learner.logprobs(policy.run_id, tokens, whole, policy.temperature)[sampled]
    q_T = p_T + random.normal(0, 0.1 if lag else 1e-6, T).astype(np.float32)
    return replace(drawn, logprobs=np.where(drawn.sampled, q_T, 0.0).astype(np.float32))


def learn(policy: Policy, centred: list[SavedStep]) -> dict[str, float]:
    """What the loops do with a step: the overlapped one centres every piece by itself, the other one all at once."""
    rl, minibatches = policy.config.rl, policy.config.overlap.minibatches
    figures, pieces = [], []
    for part in centred:
        batches, _, metrics, _ = to_minibatches(part.rollouts, part.rewards, rl, part.pieces, part.reference)
        versions = part.rollouts.versions[part.rollouts.sampled]
        figures.append(metrics)
        pieces += [(batch, bool((versions == part.version).all())) for batch in batches]
    learned = []
    for i, (batch, fresh) in enumerate(pieces):
        k, first, last = i // minibatches, i % minibatches == 0, (i + 1) % minibatches == 0
        step, on_policy = centred[0].step, k == 0 and fresh
        learned.append(policy.learn(batch, step, k, first=first, last=last, on_policy=on_policy)[1])
    return {**reduce_metrics(figures), **reduce_metrics(learned)}


def whole(parts: list[SavedStep], pieces: int) -> SavedStep:
    reference = [part.reference for part in parts if part.reference is not None]
    return replace(
        parts[0],
        pieces=pieces,
        rollouts=concatenate([part.rollouts for part in parts]),
        rewards=np.concatenate([part.rewards for part in parts]),
        reference=np.concatenate(reference) if reference else None,
    )


def train(
    base: Path, folder: Path, *overrides: str, steps: int = STEP_COUNT, rewards: Callable[[int], float] | None = None
) -> Path:
    """A run of real parts, with all in its directory that replaying a step could look at."""
    config = job(base, folder, *overrides)
    learner = lend_for(base, config.model, config.learner)
    policy = Policy(learner, config, np.arange(1, 17, dtype=np.int32))
    ledger = Ledger(Epochs(40, PROBLEMS, config.run.seed))
    random = np.random.default_rng(5)
    overlapped = config.overlap.max_policy_lag is not None
    pieces = config.rl.substeps * config.overlap.minibatches
    with RunStore.open(config, note=lambda text: None) as store:
        settings = config.model_dump(mode="json")
        with Tracker(store.run_dir, config.tracking, config.run.name, settings, note=lambda text: None) as tracker:
            store.save(0, policy.state_files(), ledger)
            for step in range(1, steps + 1):
                ledger.draw(step, PROBLEMS)
                version = learner.runs.version(policy.run_id)
                parts = []
                for i, share in enumerate(np.array_split(np.arange(PROBLEMS), pieces if overlapped else 1)):
                    rollouts = sample(policy, len(share), (step, i), lag=(step + i + 1) % 2 if overlapped else 0)
                    R = len(rollouts.group)
                    grades = random.integers(0, 2, R).astype(float) if rewards is None else np.full(R, rewards(step))
                    reference = policy.reference(rollouts) if config.rl.advantages.kl_coef > 0 else None
                    parts.append(SavedStep(step, version, 1 if overlapped else pieces, rollouts, grades, reference))
                tracker.log(step, learn(policy, parts))
                save_step(store.run_dir, whole(parts, pieces), config.tracking.rollout_steps)
                ledger.settle(step, np.full(PROBLEMS, TRAINED))
                if step % config.checkpoint.every_steps == 0:
                    store.save(step, policy.state_files(), ledger)
    LENDER.take_back()
    return store.run_dir


@pytest.fixture(scope="session")
def base(tiny_model: Callable[[bool], Path]) -> Path:
    return tiny_model(True)


@pytest.fixture(scope="session")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(base, tmp_path_factory.mktemp("runs"))


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "moved"))


def contents(folder: Path) -> Mapping[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {f"{path.relative_to(folder)}": hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def command(run: Path, step: int, *options: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["replay", str(run), "--step", str(step), *options])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output


@pytest.mark.parametrize("step", [1, 2, STEP_COUNT])
def test_a_step_is_the_same_to_the_bit(finished: Path, step: int) -> None:
    found = replay(finished, step)
    assert {figure.name for figure in found.figures} >= {*ALWAYS, "policy/ratio_mean", "policy/logprob_diff_mean"}
    assert [figure.name for figure in found.figures if figure.difference != 0] == []
    values = {figure.name: figure.recomputed for figure in found.figures}
    assert values["policy/grad_norm"] and values["loss/sum"] and values["datums/count"]
    assert found.started == step - 1 and found.notes == ()


@pytest.mark.parametrize(
    "overrides",
    [
        ["rl.advantages={baseline: leave_one_out, normalise: std}", "rl.loss={name: ppo}"],
        ["rl.advantages={kl_coef: 0.1, kl_discount: 0.9, reference_refresh_steps: 1}"],
        ["learner.token_budget=32", "rl.loss={name: cispo, importance_cap: 1.5}", "rl.substeps=2"],
        ["rl.overlong.handling=mask", "rl.advantages.aggregate=length", "rl.optim.schedule=cosine"],
        ["overlap.max_policy_lag=1", "sampler.max_live_adapters=3"],
        ["overlap={max_policy_lag: 1, minibatches: 2}", "rl.substeps=2", "rl.advantages={kl_coef: 0.1}"],
        ["overlap={max_policy_lag: 1, minibatches: 3}", "rl.loss={name: ppo}"],
    ],
)
@pytest.mark.parametrize("every", [1, 2])
def test_a_step_of_any_algorithm_is_the_same_to_the_bit(
    base: Path, tmp_path: Path, overrides: list[str], every: int
) -> None:
    run = train(base, tmp_path, f"checkpoint.every_steps={every}", *overrides, steps=2)
    found = replay(run, 2)
    assert [figure.name for figure in found.figures if figure.difference != 0] == []
    assert {figure.name for figure in found.figures} >= {*ALWAYS, "advantages/mean_abs", "policy/learning_rate"}
    assert found.started == (1 if every == 1 else 0)


def test_a_penalty_is_computed_with_the_recorded_reference_which_is_said(base: Path, tmp_path: Path) -> None:
    found = replay(train(base, tmp_path, "rl.advantages={kl_coef: 0.1}", steps=2), 2)
    assert any("recorded ones" in note for note in found.notes)
    assert next(figure for figure in found.figures if figure.name == "policy/kl_reference").recomputed != 0


def test_a_step_whose_groups_all_agree_is_the_same(base: Path, tmp_path: Path) -> None:
    run = train(base, tmp_path, rewards=lambda step: float(step == 1))
    found = replay(run, 2)
    assert found.differing(0.0) == []
    assert {figure.name: figure.recomputed for figure in found.figures}["datums/count"] == 0


def test_the_command_shows_both_values_and_ends_well(finished: Path) -> None:
    code, said = command(finished, 2)
    assert code == 0 and "the same, bit-identical" in said
    for name in (*ALWAYS, "policy/ratio_mean", "policy/logprob_diff_mean", "policy/kl_k1"):
        assert name in said
    assert f"{PROBLEMS * SAMPLES} completions of {PROBLEMS} problems" in said


def test_nothing_in_the_run_changes(run: Path) -> None:
    before = contents(run)
    assert command(run, 2)[0] == 0
    assert contents(run) == before


def differing(run: Path, step: int) -> set[str]:
    code, said = command(run, step)
    assert code == 1 and "not the same beyond 1e-05" in said
    return {figure.name for figure in replay(run, step).differing(TOLERANCE)}


def test_a_changed_reward_is_noticed(run: Path) -> None:
    kept = load_step(run, 2)
    rewards = kept.rewards.copy()
    rewards[3] = 1 - rewards[3]
    save_step(run, replace(kept, rewards=rewards), keep=9)
    assert differing(run, 2) >= {"reward/mean", "loss/sum", "policy/grad_norm"}


def test_a_changed_token_is_noticed(run: Path) -> None:
    kept = load_step(run, 2)
    tokens = kept.rollouts.tokens.copy()
    tokens[5] = (tokens[5] + 1) % 64
    save_step(run, replace(kept, rollouts=replace(kept.rollouts, tokens=tokens)), keep=9)
    assert differing(run, 2) >= {"policy/ratio_mean", "policy/logprob_diff_mean", "policy/grad_norm"}


def test_another_adapter_is_noticed(run: Path) -> None:
    """That of the wrong step, under the right name: every file of it is whole."""
    wrong, right = (run / "checkpoints" / f"step-{step:06d}" for step in (2, 1))
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        assert (wrong / name).read_bytes() != (right / name).read_bytes()
    shutil.rmtree(right)
    save_step(run, replace(load_step(run, 2), version=1), keep=9)
    with RunStore.open(job(Path("unused"), run.parent, "run.name=other"), note=lambda text: None) as other:
        ledger = Ledger(Epochs(40, PROBLEMS, 0))
        ledger.draw(1, PROBLEMS)
        ledger.settle(1, np.full(PROBLEMS, TRAINED))
        files = {
            path.name: path.read_bytes() for path in wrong.iterdir() if path.name not in ("ledger.npz", "resume.json")
        }
        shutil.copytree(other.save(1, files, ledger), right)
    with pytest.raises(CheckpointError, match=r"recorded with the learner at version 1, .* reaches version 2"):
        replay(run, 2)
    save_step(run, replace(load_step(run, 2), version=2), keep=9)
    assert differing(run, 2) >= {"policy/logprob_diff_mean", "policy/ratio_mean", "loss/sum"}


def test_a_damaged_checkpoint_or_step_is_refused(run: Path) -> None:
    file = run / STEPS / "step-000002.npz"
    whole = file.read_bytes()
    file.write_bytes(whole[:-30] + b"?" + whole[-29:])
    with pytest.raises(CheckpointError, match=r"step-000002.npz.*damaged"):
        command(run, 2)
    file.write_bytes(whole)
    weights = run / "checkpoints" / "step-000001" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match=r"step-000001.*damaged"):
        command(run, 2)


def test_a_step_without_its_checkpoint_is_reached_from_an_earlier_one(run: Path) -> None:
    for step in (2, 3):
        shutil.rmtree(run / "checkpoints" / f"step-{step:06d}")
    found = replay(run, 4)
    assert found.started == 1 and found.differing(0.0) == []
    assert found.notes == ("started from the checkpoint of step 1 and replayed steps 2 to 3 first",)


def test_without_any_checkpoint_the_seed_makes_the_beginning(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    found = replay(run, 3)
    assert found.started == 0 and found.differing(0.0) == []
    assert replayable(run) == [1, 2, 3, 4]


def test_what_is_no_longer_there_is_named_with_what_is_and_which_keys_keep_more(run: Path) -> None:
    for step in (0, 1, 2):
        shutil.rmtree(run / "checkpoints" / f"step-{step:06d}")
    (run / STEPS / "step-000001.npz").unlink()
    assert replayable(run) == [4]
    wanted = (
        r"step 2 cannot be replayed\. Replayable steps: step 4\. The run has rollouts of steps 2 to 4 and checkpoints "
        r"after steps 3 to 4\..*tracking\.rollout_steps \(was 20\) and checkpoint\.keep \(was 9\)"
    )
    for step in (1, 2, 3, 5, 0, -1):
        with pytest.raises(CheckpointError, match=wanted.replace("step 2 ", f"step {step} ")):
            replay(run, step)
    assert replay(run, 4).differing(0.0) == []


def test_a_step_that_the_run_never_finished_is_computed_all_the_same(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(line for line in lines if json.loads(line)["step"] < 3) + "\n")
    code, said = command(run, 3)
    assert code == 1 and "metrics.jsonl has no metrics of step 3" in said
    assert command(run, 2)[0] == 0


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.yaml cannot be read"):
        replay(tmp_path, 1)


def test_a_tolerance_is_the_users(run: Path) -> None:
    kept = load_step(run, 2)
    slightly = replace(kept.rollouts, logprobs=kept.rollouts.logprobs + np.float32(1e-4))
    save_step(run, replace(kept, rollouts=slightly), keep=9)
    assert command(run, 2)[0] == 1
    code, said = command(run, 2, "--tolerance", "1e-3")
    assert code == 0 and "the same, within 0.001" in said


@pytest.mark.parametrize("overrides", [[], ["overlap={max_policy_lag: 1, minibatches: 3}"]])
def test_the_token_table_holds_what_the_update_was_made_of(base: Path, tmp_path: Path, overrides: list[str]) -> None:
    run, out = train(base, tmp_path, *overrides, steps=2), tmp_path / "step.json"
    assert command(run, 2, "--out", str(out))[0] == 0
    table, kept = json.loads(out.read_text()), load_step(run, 2)
    figures = {figure["name"]: figure["recomputed"] for figure in table["figures"]}
    assert len(table["datums"]) == figures["datums/count"]
    loss = 0.0
    for datum in table["datums"]:
        r = datum["completion"]
        written = kept.rollouts.sampled[kept.rollouts.offsets[r] : kept.rollouts.offsets[r + 1]]
        assert datum["tokens"] == kept.rollouts.completion(r)[written].tolist()
        assert datum["reward"] == kept.rewards[r]
        ratio = np.exp(np.array(datum["p"]) - np.array(datum["q"]))
        loss -= float((ratio * np.array(datum["advantages"])).sum())
    assert loss == pytest.approx(figures["loss/sum"], rel=1e-4, abs=1e-5)
