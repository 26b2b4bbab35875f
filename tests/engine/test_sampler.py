"""The sampler against transformers + PEFT, on a real engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from rlsys.errors import SamplingError, WeightSyncError
from rlsys.rollouts import LENGTH, STOP, Rollouts, offsets_of
from rlsys.sampler.engine import Sampler
from rlsys.types import SamplingParams
from rlsys.weight_sync.tensors import snapshot_of
from tests.engine.tiny_engine import BOUND, EOS, LINEARS, MAX_LENGTH, VOCAB, Reference, at_work

Run = Callable[..., Any]
NEVER = SamplingParams(max_tokens=12, seed=3, stop=[])


def prompts(*lengths: int) -> dict[str, Any]:
    """Prompts of random tokens, as `sample` takes them."""
    draw = np.random.default_rng(0)
    return {
        "problems": np.arange(len(lengths)) + 100,
        "prompt_tokens": draw.integers(2, VOCAB, sum(lengths)).astype(np.int32),
        "prompt_offsets": offsets_of(lengths),
    }


def worst(rollouts: Rollouts, reference: Reference, adapter: Any, temperature: float = 1.0) -> float:
    """Largest |sampler - transformers| of any sampled token."""
    gaps = []
    for r, p in enumerate(rollouts.group):
        prompt = rollouts.prompt(p)
        whole = np.concatenate([prompt, rollouts.completion(r)])
        found = rollouts.logprobs[rollouts.offsets[r] : rollouts.offsets[r + 1]]
        gaps.append(np.abs(reference.logprobs(whole, adapter, temperature)[len(prompt) - 1 :] - found).max())
    return float(max(gaps))


def test_the_base_scores_a_sequence_as_transformers_does(sampler: Sampler, reference: Reference, run: Run) -> None:
    batch = prompts(1, MAX_LENGTH, 40)  # one token alone, and as long as the model allows
    scores = run(sampler.logprobs(batch["prompt_tokens"], batch["prompt_offsets"], None, -1))
    for start, end in zip(batch["prompt_offsets"], batch["prompt_offsets"][1:], strict=False):
        assert scores[start] == 0.0
        expected = reference.logprobs(batch["prompt_tokens"][start:end], None)
        np.testing.assert_allclose(scores[start + 1 : end], expected, atol=BOUND)


def test_an_adapter_that_was_never_trained_is_the_base_bit_for_bit_beside_one_that_was(
    sampler: Sampler, reference: Reference, run: Run
) -> None:
    trained = reference.adapter(8, 1)
    untrained = {name: tensor * (0.0 if name.endswith("lora_B") else 1.0) for name, tensor in trained.items()}
    run(sampler.load(reference.update("untrained", 0, untrained), BOUND))
    run(sampler.load(reference.update("trained", 1, trained), BOUND))
    batch = prompts(40, 3, 70)
    served = ((None, -1), ("untrained", 0), ("trained", 1))

    async def all_at_once() -> list[Rollouts]:
        return await asyncio.gather(
            *(sampler.sample(**batch, n=3, params=NEVER, run_id=r, version=v) for r, v in served)
        )

    of_base, of_untrained, of_trained = run(all_at_once())
    np.testing.assert_array_equal(of_base.tokens, of_untrained.tokens)
    np.testing.assert_array_equal(of_base.logprobs, of_untrained.logprobs)
    assert worst(of_trained, reference, trained) < BOUND


def test_base_and_adapters_of_two_ranks_agree_with_peft_in_one_batch(
    sampler: Sampler, reference: Reference, run: Run
) -> None:
    small = reference.adapter(3, 1, targets=["q_proj", "v_proj", "gate_proj", "down_proj"])
    large = reference.adapter(8, 2, targets=[*LINEARS, "lm_head"])
    run(sampler.load(reference.update("small", 1, small), BOUND))
    run(sampler.load(reference.update("large", 7, large), BOUND))
    served = [(None, -1, None), ("small", 1, small), ("large", 7, large)]
    batch = prompts(40, 3, 70)

    async def all_at_once() -> list[Any]:
        sampled = [sampler.sample(**batch, n=3, params=NEVER, run_id=r, version=v) for r, v, _ in served]
        scored = [sampler.logprobs(batch["prompt_tokens"], batch["prompt_offsets"], r, v) for r, v, _ in served]
        return await asyncio.gather(*sampled, *scored)

    results = run(all_at_once())
    for rollouts, scores, (_, version, adapter) in zip(results[:3], results[3:], served, strict=True):
        assert worst(rollouts, reference, adapter) < BOUND
        assert (rollouts.versions == version).all()
        assert list(rollouts.group) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        expected = reference.logprobs(batch["prompt_tokens"][43:], adapter)
        np.testing.assert_allclose(scores[44:], expected, atol=BOUND)


def test_logprobs_are_of_the_distribution_that_was_drawn_from(sampler: Sampler, reference: Reference, run: Run) -> None:
    warm = replace(NEVER, temperature=0.7)
    rollouts = run(sampler.sample(**prompts(20), n=4, params=warm, run_id=None, version=-1))
    assert worst(rollouts, reference, None, temperature=0.7) < BOUND
    first = replace(NEVER, top_k=1)
    assert not run(sampler.sample(**prompts(20), n=2, params=first, run_id=None, version=-1)).logprobs.any()


def test_completions_differ_and_a_seed_repeats_them_wherever_their_problem_stands(sampler: Sampler, run: Run) -> None:
    two = prompts(20, 20)
    two["prompt_tokens"][20:] = two["prompt_tokens"][:20]

    def draw(batch: dict[str, Any], params: SamplingParams) -> list[tuple[int, ...]]:
        rollouts = run(sampler.sample(**batch, n=4, params=params, run_id=None, version=-1))
        return [tuple(rollouts.completion(r).tolist()) for r in range(len(rollouts.group))]

    whole = draw(two, NEVER)
    assert len(set(whole)) == 8
    assert draw(two, NEVER) == whole
    second = {
        "problems": two["problems"][1:],
        "prompt_tokens": two["prompt_tokens"][20:],
        "prompt_offsets": offsets_of([20]),
    }
    assert draw(second, NEVER) == whole[4:]
    unseeded = replace(NEVER, seed=None)
    assert len({*draw(two, unseeded), *draw(two, unseeded), *whole}) == 24
    same_problem = {**two, "problems": np.array([9, 9])}
    assert len(set(draw(same_problem, NEVER))) == 8


def test_greedy_takes_the_likeliest_token_and_copies_it(sampler: Sampler, reference: Reference, run: Run) -> None:
    greedy = SamplingParams(max_tokens=6, temperature=0.0, stop=[])
    rollouts = run(sampler.sample(**prompts(20, 30), n=2, params=greedy, run_id=None, version=-1))
    assert list(rollouts.group) == [0, 0, 1, 1]
    np.testing.assert_array_equal(rollouts.completion(0), rollouts.completion(1))
    whole = np.concatenate([rollouts.prompt(1), rollouts.completion(2)])
    np.testing.assert_array_equal(reference.logits(whole, None).argmax(-1)[29:-1].numpy(), rollouts.completion(2))
    assert worst(rollouts, reference, None) < BOUND


def test_completions_end_where_asked(sampler: Sampler, run: Run) -> None:
    batch = prompts(20)
    long = SamplingParams(max_tokens=60, seed=1, stop=[])

    def draw(stop: Any) -> Rollouts:
        return run(sampler.sample(**batch, n=16, params=replace(long, stop=stop), run_id=None, version=-1))

    free = draw([])
    assert (free.lengths == 60).all() and (free.stop_reasons == LENGTH).all() and EOS in free.tokens
    others = [token for token in free.completion(0)[5:].tolist() if token != EOS]
    for stop, ids in ((None, {EOS}), ([others[0]], {others[0]}), (["w0"], {0, EOS}), (["w1", "w0"], {0, EOS})):
        ended = draw(stop)
        assert (ended.stop_reasons == STOP).any()
        for r in range(16):
            whole, part = free.completion(r).tolist(), ended.completion(r).tolist()
            assert part == whole[: len(part)]
            assert not ids & set(part[:-1])
            assert (part[-1] in ids) == (ended.stop_reasons[r] == STOP)


def test_stop_strings_add_to_the_end_tokens(sampler: Sampler, run: Run) -> None:
    batch, long = prompts(20), SamplingParams(max_tokens=60, seed=1, stop=[])

    def draw(stop: Any) -> Rollouts:
        return run(sampler.sample(**batch, n=16, params=replace(long, stop=stop), run_id=None, version=-1))

    free = draw([])
    word = next(token for token in free.completion(0)[5:].tolist() if token > 1)
    for stop in (f"w{word}", [f"w{word}", "never written"], ["w1", f"w{word}"]):
        ended = draw(stop)
        last = [ended.completion(r)[-1] for r in range(16) if ended.stop_reasons[r] == STOP]
        assert EOS in last and any(f"w{token}".startswith(f"w{word}") for token in last)
        for r in range(16):
            whole, part = free.completion(r).tolist(), ended.completion(r).tolist()
            assert part == whole[: len(part)]
            assert EOS not in part[:-1]
            # as text, w15 ends a completion at w150 too
            assert ended.stop_reasons[r] != STOP or part[-1] == EOS or f"w{part[-1]}".startswith(f"w{word}")


def test_what_cannot_be_served_is_refused_by_name(sampler: Sampler, reference: Reference, run: Run) -> None:
    base: dict[str, Any] = {"n": 2, "run_id": None, "version": -1}
    with pytest.raises(SamplingError, match=r"problem 101: found 248 tokens \+ max_tokens 12; wanted at most .*= 256"):
        run(sampler.sample(**prompts(5, 248), params=NEVER, **base))
    wrong = prompts(5, 5)
    wrong["prompt_tokens"][2] = VOCAB
    with pytest.raises(SamplingError, match=r"problem 100: found token id 160; wanted 0 to 159"):
        run(sampler.sample(**wrong, params=NEVER, **base))
    with pytest.raises(SamplingError, match=r"problem 101: found no token"):
        run(sampler.sample(**prompts(5, 0), params=NEVER, **base))
    with pytest.raises(SamplingError, match=r"temperature: found 0.001"):
        run(sampler.sample(**prompts(5), params=replace(NEVER, temperature=0.001), **base))
    with pytest.raises(SamplingError, match=r"sequence 1: found 257 tokens; wanted at most .*= 256"):
        run(sampler.logprobs(np.zeros(262, np.int32), offsets_of([5, 257]), None, -1))
    run(sampler.load(reference.update("a", 4, reference.adapter(2, 1)), BOUND))
    with pytest.raises(SamplingError, match=r"sampler-0: run 'a' version 5 is not loaded; live run and version: 'a' 4"):
        run(sampler.sample(**prompts(5), n=2, params=NEVER, run_id="a", version=5))
    assert sampler.stats().running_requests == 0


def test_a_new_version_never_reuses_the_prefixes_of_an_old_one(
    sampler: Sampler, reference: Reference, run: Run
) -> None:
    batch, previous = prompts(100), None
    for version in range(3):
        adapter = reference.adapter(4, version)
        run(sampler.load(reference.update("a", version, adapter, previous), BOUND))
        rollouts = run(sampler.sample(**batch, n=2, params=NEVER, run_id="a", version=version))
        assert worst(rollouts, reference, adapter) < BOUND
        previous = adapter


def test_a_loaded_version_is_attested_and_the_one_before_lives_on(
    sampler: Sampler, reference: Reference, run: Run
) -> None:
    old, new = reference.adapter(4, 1), reference.adapter(4, 2)
    run(sampler.load(reference.update("a", 1, old), BOUND))
    update = reference.update("a", 2, new, old)
    attestation = run(sampler.load(update, BOUND))
    assert attestation.digest == update.snapshot.digest
    assert attestation.has_power and attestation.distance_new < 1e-5 < 0.01 < attestation.separation
    assert sampler.stats().live == (("a", 1), ("a", 2))
    rollouts = run(sampler.sample(**prompts(30), n=2, params=NEVER, run_id="a", version=1))
    assert worst(rollouts, reference, old) < BOUND


def test_slots_that_differ_from_what_the_learner_hashed_are_caught(
    sampler: Sampler, reference: Reference, run: Run
) -> None:
    adapter = reference.adapter(4, 1)
    snapshot = snapshot_of("a", 1, 4, adapter, "float32")
    bent = snapshot.buffer.copy()
    bent[-1] ^= 1
    update = reference.update("a", 1, adapter, snapshot=replace(snapshot, buffer=bent))
    with pytest.raises(WeightSyncError, match=r"sampler-0, run 'a', version 1: the engine's slots have digest"):
        run(sampler.load(update, BOUND))
    assert sampler.stats().live == ()
    with pytest.raises(SamplingError, match="not loaded"):
        run(sampler.sample(**prompts(5), n=1, params=NEVER, run_id="a", version=1))
    run(sampler.load(reference.update("a", 1, adapter), BOUND))  # the right one still finds its place


def test_a_sampler_that_serves_the_previous_weights_is_caught(sampler: Sampler, reference: Reference, run: Run) -> None:
    old = reference.adapter(4, 1)
    near = {name: tensor * 1.01 for name, tensor in old.items()}
    run(sampler.load(reference.update("a", 1, old), BOUND))
    skipped = reference.update("a", 2, near, old, snapshot=snapshot_of("a", 2, 4, old, "float32"))
    with pytest.raises(WeightSyncError, match=r"sampler-0, run 'a', version 2: .*wanted to be nearer to the new"):
        run(sampler.load(skipped, bound=1.0))
    far = reference.update("a", 2, reference.adapter(4, 3), old, snapshot=snapshot_of("a", 2, 4, old, "float32"))
    with pytest.raises(WeightSyncError, match=r"version 2: .*wanted at most 0.001 to the new version"):
        run(sampler.load(far, bound=1e-3))
    assert sampler.stats().live == (("a", 1),)


def test_two_versions_closer_than_the_noise_prove_nothing(sampler: Sampler, reference: Reference, run: Run) -> None:
    adapter = reference.adapter(4, 1)
    run(sampler.load(reference.update("a", 1, adapter), BOUND))
    attestation = run(sampler.load(reference.update("a", 2, adapter, adapter), BOUND))
    assert not attestation.has_power
    assert attestation.separation == 0.0


def test_a_probe_leaves_nothing_behind_and_fails_without_power(
    sampler: Sampler, reference: Reference, run: Run
) -> None:
    adapter = reference.adapter(8, 1, size=0.5)
    assert run(sampler.probe(reference.startup(adapter))).has_power
    with pytest.raises(WeightSyncError, match="wanted a larger B"):
        run(sampler.probe(reference.startup(adapter, adapter)))
    assert sampler.stats().live == ()


def test_a_start_is_refused_where_the_base_differs_from_the_learners_at_late_positions_alone(
    sampler: Sampler, reference: Reference, run: Run
) -> None:
    probe = reference.startup(reference.adapter(8, 1, size=0.5))
    late = probe.base.positions >= MAX_LENGTH - 16
    wrong = replace(probe.base, logprobs=probe.base.logprobs + np.where(late, 0.01, 0.0))
    with pytest.raises(WeightSyncError, match=r"positions 240-255: 0\.01 .*grows with the position"):
        run(sampler.probe(replace(probe, base=wrong)))
    assert sampler.stats().live == ()


def test_the_oldest_idle_version_makes_room_and_the_last_of_a_run_never_does(
    sampler: Sampler, reference: Reference, run: Run
) -> None:
    adapter = reference.adapter(2, 1)
    for key in (("a", 1), ("a", 2), ("b", 1), ("b", 2), ("a", 3)):
        run(sampler.load(reference.update(*key, adapter), BOUND))
    assert sampler.stats().live == (("a", 2), ("b", 1), ("b", 2), ("a", 3))

    async def load_while_busy() -> None:
        busy = asyncio.create_task(
            sampler.sample(**prompts(5), n=2, params=replace(NEVER, max_tokens=100), run_id="a", version=2)
        )
        await asyncio.sleep(0)
        await sampler.load(reference.update("b", 3, adapter), BOUND)
        assert (await busy).lengths.min() == 100

    run(load_while_busy())
    assert sampler.stats().live == (("a", 2), ("b", 2), ("a", 3), ("b", 3))
    run(sampler.load(reference.update("c", 1, adapter), BOUND))
    run(sampler.load(reference.update("d", 1, adapter), BOUND))
    with pytest.raises(WeightSyncError, match=r"no room for run 'e'.*raise sampler.max_live_adapters"):
        run(sampler.load(reference.update("e", 1, adapter), BOUND))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 9}, "found rank 9; wanted at most sampler.max_lora_rank = 8"),
        ({"dtype": "bfloat16"}, "found bfloat16; wanted model.dtype float32"),
        ({"name": "model.layers.9.mlp.up_proj.lora_A"}, "no LoRA slot for model.layers.9.mlp.up_proj"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    sampler: Sampler, reference: Reference, run: Run, change: dict[str, Any], message: str
) -> None:
    adapter = reference.adapter(change.get("rank", 4), 1, targets=["q_proj"])
    if "name" in change:
        adapter = {**adapter, change["name"]: torch.ones(4, 64), change["name"][:-1] + "B": torch.ones(128, 4)}
    snapshot = snapshot_of("a", 1, change.get("rank", 4), adapter, change.get("dtype", "float32"))
    update = reference.update("a", 1, reference.adapter(4, 1), snapshot=snapshot)
    with pytest.raises(WeightSyncError, match=message):
        run(sampler.load(update, BOUND))


def test_cancelling_the_caller_ends_its_requests(sampler: Sampler, run: Run) -> None:
    async def cancel() -> None:
        long = replace(NEVER, max_tokens=100)
        task = asyncio.create_task(sampler.sample(**prompts(5), n=8, params=long, run_id=None, version=-1))
        await at_work(sampler)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(cancel())
    assert sampler.stats().running_requests == 0
    assert sampler.engine.llm.get_num_unfinished_requests() == 0
