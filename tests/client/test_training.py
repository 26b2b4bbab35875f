"""Training clients on a real learner: order, results, errors."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np
import pytest
import torch

import rlsys
from rlsys import types
from rlsys.errors import (
    CheckpointError,
    ConfigError,
    DatumError,
    GradientError,
    LossError,
    MissingInputError,
)
from tests.waiting import FAR_S

ADAM = types.AdamParams(learning_rate=1e-2)


def rl_datum(container: Any = list, **inputs: Any) -> types.Datum:
    ids = [5, 900, 31_000, 7]
    given = {"target_tokens": [900, 31_000, 7, 40_000], "logprobs": [-1.0] * 4, "advantages": [1.0] * 4, **inputs}
    made = {key: container(value) for key, value in given.items()}
    return types.Datum(types.ModelInput.from_ints(ids), made)


def test_steps_submitted_together_are_steps_one_after_the_other(
    service: rlsys.ServiceClient, datum: types.Datum
) -> None:
    together, apart = (service.create_lora_training_client("tiny", rank=4, seed=3) for _ in range(2))
    in_flight = []
    for _ in range(4):
        in_flight.append(together.forward_backward([datum], "cross_entropy"))
        together.optim_step(ADAM)
    pipelined = [passed.result(FAR_S).loss for passed in in_flight]
    one_by_one = []
    for _ in range(4):
        one_by_one.append(apart.forward_backward([datum], "cross_entropy").result(FAR_S).loss)
        apart.optim_step(ADAM).result(FAR_S)
    assert pipelined == one_by_one
    assert pipelined == sorted(pipelined, reverse=True) and pipelined[-1] < pipelined[0]


def test_calls_from_several_threads_take_effect_in_the_order_in_which_they_were_entered(
    trainer: rlsys.TrainingClient, datum: types.Datum
) -> None:
    """Each thread waits for the one before to have entered its call, not for its answer."""
    turns = [threading.Event() for _ in range(9)]
    losses: list[Any] = [None] * 8

    def enter(i: int) -> None:
        assert turns[i].wait(FAR_S)
        if i % 2:
            losses[i] = trainer.optim_step(ADAM)
        else:
            losses[i] = trainer.forward_backward([datum] * (40 if i == 0 else 1), "cross_entropy")
        turns[i + 1].set()

    threads = [threading.Thread(target=enter, args=(i,)) for i in reversed(range(8))]
    for thread in threads:
        thread.start()
    turns[0].set()
    for thread in threads:
        thread.join()
    found = [losses[i].result(FAR_S).loss for i in range(2, 8, 2)]
    assert losses[0].result(FAR_S).loss / 40 > found[0] > found[1] > found[2]
    assert all(losses[i].result(FAR_S).metrics["grad_norm"] > 0 for i in range(1, 8, 2))


def test_tasks_and_a_loss_at_the_caller_keep_their_place(service: rlsys.ServiceClient, datum: types.Datum) -> None:
    """A step entered after a two-pass loss comes after both passes, though the second is sent later."""

    def nll(data: list[types.Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        return -torch.stack([logp.sum() for logp in logprobs]).sum(), {}

    async def steps(client: rlsys.TrainingClient, custom: bool) -> list[float]:
        async def one() -> Any:
            if custom:
                return await client.forward_backward_custom_async([datum], nll, where="caller")
            return await client.forward_backward_async([datum], "cross_entropy")

        calls = [call for _ in range(3) for call in (one(), client.optim_step_async(ADAM))]
        futures = await asyncio.gather(*calls)
        return [(await future).loss for future in futures[::2]]

    at_caller, built_in = (service.create_lora_training_client("tiny", rank=4, seed=3) for _ in range(2))
    assert asyncio.run(steps(at_caller, True)) == pytest.approx(asyncio.run(steps(built_in, False)), rel=1e-6)


def test_a_refused_call_takes_its_turn_and_blocks_nobody(trainer: rlsys.TrainingClient, datum: types.Datum) -> None:
    with pytest.raises(LossError):
        trainer.forward_backward([datum], "cross_entropi")
    assert trainer.forward_backward([datum], "cross_entropy").result(FAR_S).loss > 0


def test_a_loss_at_the_caller_that_fails_blocks_nobody(trainer: rlsys.TrainingClient, datum: types.Datum) -> None:
    def failing(data: list[types.Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        return torch.tensor(1 / 0), {}

    failed = trainer.forward_backward_custom([datum], failing, where="caller")
    assert trainer.forward([datum], "cross_entropy").result(FAR_S).loss > 0
    with pytest.raises(LossError, match="ZeroDivisionError"):
        failed.result(FAR_S)
    with pytest.raises(GradientError):
        trainer.optim_step(ADAM).result(FAR_S)


@pytest.mark.parametrize(
    ("container", "wanted"),
    [(list, list), (np.array, np.ndarray), (torch.tensor, torch.Tensor), (types.TensorData, types.TensorData)],
)
def test_log_probabilities_come_in_the_container_of_the_targets(
    trainer: rlsys.TrainingClient, container: Any, wanted: type
) -> None:
    result = trainer.forward([rl_datum(container)], "importance_sampling").result(FAR_S)
    found = result.loss_fn_outputs[0]["logprobs"]
    assert isinstance(found, wanted) and len(np.asarray(found)) == 4 and max(np.asarray(found)) < 0


def test_an_rl_loss_reports_ratio_clipping_and_kl(trainer: rlsys.TrainingClient) -> None:
    result = trainer.forward_backward([rl_datum()], "ppo").result(FAR_S)
    assert result.loss == result.metrics["loss:sum"]
    assert {"ratio:mean", "ratio:max", "clip_fraction:mean", "kl_k1:mean", "kl_k3:mean"} <= result.metrics.keys()
    logp = np.array(result.loss_fn_outputs[0]["logprobs"], np.float64)
    ratio = np.exp(logp + 1.0)
    assert result.loss == pytest.approx(-np.minimum(ratio, np.clip(ratio, 0.8, 1.2)).sum(), rel=1e-6)


def test_inputs_in_mints_ways_mean_the_same(trainer: rlsys.TrainingClient) -> None:
    plain = trainer.forward([rl_datum()], "ppo").result(FAR_S).loss
    assert trainer.forward([rl_datum(advantages=[1.0])], "ppo").result(FAR_S).loss == plain
    renamed = dict(rl_datum().loss_fn_inputs)
    renamed["behavior_logprobs"] = renamed.pop("logprobs")
    aliased = types.Datum(types.ModelInput.from_ints([5, 900, 31_000, 7]), renamed)
    assert trainer.forward([aliased], "ppo").result(FAR_S).loss == plain
    inputs = {"target_tokens": [900, 31_000, 7, 40_000]}
    weighted = [
        types.Datum(types.ModelInput.from_ints([5, 900, 31_000, 7]), {**inputs, "weights": weights})
        for weights in ([0, 0, 1, 1, 1], [0, 1, 1, 1])
    ]
    first, second = (trainer.forward([datum], "cross_entropy").result(FAR_S).loss for datum in weighted)
    assert first == second > 0


def test_a_custom_loss_has_one_gradient_wherever_it_runs(service: rlsys.ServiceClient) -> None:
    """One step after each leaves the same weights, so the same log-probabilities."""

    def pairwise(data: list[types.Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        margin = logprobs[0].sum() - logprobs[1].sum()
        return -torch.nn.functional.logsigmoid(0.1 * margin), {"margin": margin.item()}

    data = [rl_datum(), rl_datum(target_tokens=[1, 2, 3, 4])]
    found = {}
    for where in ("learner", "caller"):
        client = service.create_lora_training_client("tiny", rank=4, seed=9)
        result = client.forward_backward_custom(data, pairwise, where=where).result(FAR_S)
        norm = client.optim_step(types.AdamParams(learning_rate=1e-3)).result(FAR_S).metrics["grad_norm"]
        after = client.forward([rl_datum()], "ppo").result(FAR_S).loss_fn_outputs[0]["logprobs"]
        found[where] = (result.loss, result.metrics["margin"], norm, *after)
        assert result.metrics["loss:sum"] == result.loss
        assert result.metrics["custom_passes:unique"] == (1.0 if where == "learner" else 2.0)
    assert found["caller"] == pytest.approx(found["learner"], rel=1e-5)


def test_a_function_that_cannot_be_shipped_is_refused_by_name(
    trainer: rlsys.TrainingClient, datum: types.Datum
) -> None:
    lock = threading.Lock()

    def guarded(data: list[types.Datum], logprobs: list[torch.Tensor]) -> Any:
        with lock:
            return logprobs[0].sum(), {}

    with pytest.raises(LossError, match=r"guarded.*'lock', a lock,.*where='caller'"):
        trainer.forward_backward_custom([datum], guarded)
    assert trainer.forward_backward_custom([datum], guarded, where="caller").result(FAR_S).loss < 0


def test_a_state_comes_back_whole(service: rlsys.ServiceClient, datum: types.Datum) -> None:
    """What continues from a saved state does bit for bit what the original does."""
    original = service.create_lora_training_client("tiny", rank=4, seed=5)

    def step(client: rlsys.TrainingClient) -> float:
        passed = client.forward_backward([datum], "cross_entropy")
        client.optim_step(ADAM)
        return passed.result(FAR_S).loss

    step(original)
    path = original.save_state("middle").result(FAR_S).path
    ahead = [step(original) for _ in range(3)]
    restored = service.create_training_client_from_state_with_optimizer(path)
    assert [step(restored) for _ in range(3)] == ahead
    fresh = service.create_training_client_from_state(path)
    assert [step(fresh) for _ in range(3)] != ahead
    original.load_state_with_optimizer(path)
    assert [step(original) for _ in range(3)] == ahead


def passed(client: rlsys.TrainingClient, loss_fn: str = "ppo", config: Any = None, **inputs: Any) -> Any:
    return client.forward_backward([rl_datum(**inputs)], loss_fn, config)


def without_logprobs(client: rlsys.TrainingClient) -> Any:
    inputs = {"target_tokens": [6, 7], "advantages": [1.0]}
    return client.forward_backward([types.Datum(types.ModelInput.from_ints([5, 6]), inputs)], "ppo")


NAN = [1.0, float("nan"), 1.0, 1.0]
WRONG: list[tuple[str, Any, type[Exception], str]] = [
    ("missing logprobs", without_logprobs, MissingInputError, "'logprobs'.*missing"),
    ("length mismatch", lambda c: passed(c, logprobs=[-1.0] * 3), DatumError, r"found shape \(3,\)"),
    ("unknown loss", lambda c: passed(c, "ppoo"), LossError, "did you mean 'ppo'"),
    ("unknown config key", lambda c: passed(c, config={"clip_low": 0.9}), LossError, "did you mean"),
    ("NaN advantage", lambda c: passed(c, advantages=NAN), DatumError, "nan at position 1"),
    ("token out of vocabulary", lambda c: passed(c, target_tokens=[1, 2, 3, 50_000]), DatumError, "found 50000"),
    ("both names of logprobs", lambda c: passed(c, behavior_logprobs=[-1.0] * 4), DatumError, "found both"),
    ("optim_step without gradient", lambda c: c.optim_step(ADAM).result(FAR_S), GradientError, "nothing to apply"),
    ("foreign checkpoint", lambda c: c.load_state("/tmp").result(FAR_S), CheckpointError, "/tmp"),
    ("path out of the folder", lambda c: c.load_state("rlsys://x/weights/..").result(FAR_S), CheckpointError, r"\.\."),
    ("name out of the folder", lambda c: c.save_state("../up").result(FAR_S), CheckpointError, r"\.\./up"),
]


@pytest.mark.parametrize("row", WRONG, ids=lambda row: row[0])
def test_a_wrong_call_says_what_is_wrong(row: Any, trainer: rlsys.TrainingClient) -> None:
    what, call, error, message = row
    with pytest.raises(error, match=message) as raised:
        call(trainer)
    print(f"\n{what}: {type(raised.value).__name__}: {raised.value}")


def test_a_missing_input_is_a_key_error_too(trainer: rlsys.TrainingClient) -> None:
    with pytest.raises(KeyError):
        WRONG[0][1](trainer)


def test_an_unknown_model_lists_the_known_ones(service: rlsys.ServiceClient) -> None:
    with pytest.raises(ConfigError, match=r"'nope'.*'tiny' \(running\)") as raised:
        service.create_lora_training_client("nope")
    print(f"\nunknown model: {raised.value}")


def test_a_rank_that_cannot_be_served_is_refused(service: rlsys.ServiceClient) -> None:
    with pytest.raises(ConfigError, match=r"rank: found 64.*at most 16"):
        service.create_lora_training_client("tiny", rank=64)
