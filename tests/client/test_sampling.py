"""Sampling clients on a real engine: snapshots that stay, leave and come back."""

from __future__ import annotations

import asyncio
import gc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import ray

import rlsys
from rlsys import types
from rlsys.client.results import ShapedSequence
from rlsys.errors import ConfigError, SamplingError
from tests.client.tiny_base import LIVE
from tests.waiting import FAR_S

PROMPT = types.ModelInput.from_ints([5, 900, 31_000, 7])
FEW = types.SamplingParams(max_tokens=6, stop=[], seed=11)


def resident(service: rlsys.ServiceClient) -> list[str]:
    backend: Any = service._backend
    deployment = backend.deployment("tiny")
    found: list[str] = ray.get(deployment.actors[0].resident.remote())
    return found


def train(client: rlsys.TrainingClient, datum: types.Datum) -> None:
    client.forward_backward([datum], "cross_entropy")
    client.optim_step(types.AdamParams(learning_rate=2e-2))


def test_sampler_and_learner_agree_on_what_was_sampled(trainer: rlsys.TrainingClient, datum: types.Datum) -> None:
    for _ in range(3):
        train(trainer, datum)
    answer = trainer.save_weights_and_get_sampling_client().sample(PROMPT, 3, FEW).result(FAR_S)
    assert len({tuple(one.tokens) for one in answer.sequences}) == 3
    for one in answer.sequences:
        ids = PROMPT.to_ints() + one.tokens
        inputs = {"target_tokens": ids[1:], "weights": [1.0] * (len(ids) - 1)}
        scored = types.Datum(types.ModelInput.from_ints(ids[:-1]), inputs)
        learner = trainer.forward([scored], "cross_entropy").result(FAR_S).loss_fn_outputs[0]["logprobs"]
        assert np.abs(np.array(learner[3:]) - one.logprobs).max() < 1e-4
        assert one.on_policy and one.stop_reason == "length"


def test_a_snapshot_answers_alike_after_newer_saves_and_after_it_left_the_engine(
    service: rlsys.ServiceClient, trainer: rlsys.TrainingClient, datum: types.Datum
) -> None:
    snapshots, first = [], []
    for _ in range(LIVE + 2):
        train(trainer, datum)
        snapshots.append(trainer.save_weights_and_get_sampling_client())
        first.append(snapshots[-1].compute_logprobs(PROMPT).result(FAR_S))
        assert len(resident(service)) <= LIVE
    assert len({tuple(scores) for scores in first}) == len(snapshots)
    keys = [one._snapshot.key for one in snapshots]  # type: ignore[union-attr]
    assert keys[0] not in resident(service)
    assert [one.compute_logprobs(PROMPT).result(FAR_S) for one in snapshots] == first
    assert snapshots[0].sample(PROMPT, 1, FEW).result(FAR_S).sequences == (
        snapshots[0].sample(PROMPT, 1, FEW).result(FAR_S).sequences
    )


def test_more_snapshots_than_the_engine_holds_can_be_asked_at_once(
    trainer: rlsys.TrainingClient, datum: types.Datum
) -> None:
    snapshots = []
    for _ in range(LIVE + 3):
        train(trainer, datum)
        snapshots.append(trainer.save_weights_and_get_sampling_client())
    alone = [one.sample(PROMPT, 2, FEW).result(FAR_S).sequences for one in snapshots]

    async def at_once() -> list[list[ShapedSequence]]:
        answers = await asyncio.gather(*(one.sample_async(PROMPT, 2, FEW) for one in snapshots for _ in range(3)))
        return [answer.sequences for answer in answers]

    for i, sequences in enumerate(asyncio.run(at_once())):
        assert [one.tokens for one in sequences] == [one.tokens for one in alone[i // 3]]


def test_without_a_seed_each_call_draws_anew_and_with_one_it_repeats(service: rlsys.ServiceClient) -> None:
    client = service.create_sampling_client(base_model="tiny")

    def drawn(params: types.SamplingParams) -> list[tuple[int, ...]]:
        return [tuple(one.tokens) for one in client.sample(PROMPT, 4, params).result(FAR_S).sequences]

    unseeded = [drawn(replace(FEW, seed=None)) for _ in range(3)]
    assert len(set(map(tuple, unseeded))) == 3
    assert len({one for call in unseeded for one in call}) > 8, "of 12; few tokens are likely, so two may be alike"
    assert drawn(FEW) == drawn(FEW) and len(set(drawn(FEW))) == 4
    assert drawn(replace(FEW, temperature=0.0, seed=None)) == drawn(replace(FEW, temperature=0.0, seed=None))


def test_a_snapshot_that_nobody_holds_leaves_the_engine(
    service: rlsys.ServiceClient, trainer: rlsys.TrainingClient, datum: types.Datum
) -> None:
    train(trainer, datum)
    client = trainer.save_weights_and_get_sampling_client()
    client.compute_logprobs(PROMPT).result(FAR_S)
    key = client._snapshot.key  # type: ignore[union-attr]
    assert key in resident(service)
    del client
    gc.collect()
    base = service.create_sampling_client(base_model="tiny")
    for _ in range(100):
        base.compute_logprobs(PROMPT).result(FAR_S)
        if key not in resident(service):
            break
    assert key not in resident(service)


def test_prompt_log_probabilities_come_with_the_likeliest(service: rlsys.ServiceClient) -> None:
    client = service.create_sampling_client(base_model="tiny")
    answer = client.sample(PROMPT, 1, FEW, include_prompt_logprobs=True, topk_prompt_logprobs=3).result(FAR_S)
    assert answer.prompt_logprobs == client.compute_logprobs(PROMPT).result(FAR_S)
    assert answer.prompt_logprobs is not None and answer.topk_prompt_logprobs is not None
    assert answer.prompt_logprobs[0] is None and answer.topk_prompt_logprobs[0] is None
    for own, likeliest in zip(answer.prompt_logprobs[1:], answer.topk_prompt_logprobs[1:], strict=True):
        assert likeliest is not None and own is not None and len({token for token, _ in likeliest}) == 3
        values = [value for _, value in likeliest]
        assert values == sorted(values, reverse=True) and values[0] >= own


@pytest.mark.parametrize("n", [1, 3])
def test_scoring_the_prompt_changes_neither_completions_nor_scores(n: int, service: rlsys.ServiceClient) -> None:
    client = service.create_sampling_client(base_model="tiny")
    params = types.SamplingParams(max_tokens=4, seed=11, stop=[])
    plain = client.sample(PROMPT, n, params).result(FAR_S)
    scored = client.sample(PROMPT, n, params, include_prompt_logprobs=True, topk_prompt_logprobs=2).result(FAR_S)
    assert [each.tokens for each in scored.sequences] == [each.tokens for each in plain.sequences]
    assert scored.prompt_logprobs is not None
    wanted = client.compute_logprobs(PROMPT).result(FAR_S)
    assert scored.prompt_logprobs[1:] == pytest.approx(wanted[1:], abs=1e-5)


def test_a_saved_adapter_samples_as_it_did_in_memory(
    service: rlsys.ServiceClient, trainer: rlsys.TrainingClient, datum: types.Datum
) -> None:
    train(trainer, datum)
    memory = trainer.save_weights_and_get_sampling_client()
    path = trainer.save_weights_for_sampler("for-sampling").result(FAR_S).path
    saved = service.create_sampling_client(model_path=path)
    assert saved.model_path == path and memory.model_path is None
    assert saved.compute_logprobs(PROMPT).result(FAR_S) == memory.compute_logprobs(PROMPT).result(FAR_S)


def test_shaped_sampling_is_allowed_and_says_so(service: rlsys.ServiceClient) -> None:
    client = service.create_sampling_client(base_model="tiny")
    params = types.SamplingParams(max_tokens=2, temperature=0.7, top_k=5)
    one = client.sample(PROMPT, 1, params).result(FAR_S).sequences[0]
    assert (one.temperature, one.top_k, one.on_policy) == (0.7, 5, False)


def test_a_wrong_request_says_what_is_wrong(service: rlsys.ServiceClient) -> None:
    client = service.create_sampling_client(base_model="tiny")
    with pytest.raises(SamplingError, match="num_samples: found 0"):
        client.sample(PROMPT, 0, FEW)
    with pytest.raises(SamplingError, match="max_length"):
        client.sample(PROMPT, 1, types.SamplingParams(max_tokens=1000)).result(FAR_S)
    with pytest.raises(ConfigError, match="neither base_model nor model_path"):
        service.create_sampling_client()
