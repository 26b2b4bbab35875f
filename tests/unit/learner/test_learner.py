"""The learner as mathematics: what gradients, steps, adapters and log-probabilities have to be."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from rlsys import losses
from rlsys.config import LearnerSection, LoraSection, ModelSection
from rlsys.datums import DatumBatch, concatenate, take
from rlsys.errors import ConfigError, GradientError
from rlsys.learner.learner import Learner
from rlsys.learner.runs import BASE_RUN
from rlsys.types import AdamParams
from rlsys.weight_sync.tensors import tensors_of
from tests.unit.tiny_learner import (
    ALL_TARGETS,
    Models,
    alone,
    assert_close,
    assert_same_bits,
    base_bytes,
    draw,
    gradients,
    lend,
    make,
    plain,
    reference,
    state,
    weights,
    with_run,
)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("budget", [1, 30, 1000])
def test_packed_logprobs_are_those_of_each_sequence_alone(tiny_model: Models, tied: bool, budget: int) -> None:
    batch = draw()
    learner = lend(tiny_model(tied), torch.float64, budget)
    found = learner.forward(None, batch, losses.resolve("cross_entropy"))
    np.testing.assert_allclose(found.logprobs, reference(tiny_model(tied), batch), rtol=2e-7)
    fp32 = lend(tiny_model(tied), torch.float32, budget).forward(None, batch, losses.resolve("cross_entropy"))
    np.testing.assert_allclose(fp32.logprobs, found.logprobs, rtol=1e-4)


def test_the_loss_is_the_sum_of_its_values_and_the_metrics_say_so(tiny_model: Models) -> None:
    batch = draw()
    result = lend(tiny_model(True), torch.float64).forward(None, batch, losses.resolve("cross_entropy"))
    wanted = -(reference(tiny_model(True), batch) * batch.columns["weights"]).sum()
    assert result.loss_sum == pytest.approx(wanted, rel=1e-12)
    assert result.metrics["loss:sum"] == result.loss_sum
    assert result.metrics["nll:mean"] == pytest.approx(wanted / batch.columns["weights"].sum(), rel=1e-12)


def test_the_gradient_is_that_of_finite_differences(tiny_model: Models) -> None:
    learner = with_run(lend(tiny_model(True), torch.float64, budget=30))
    batch, loss_fn = draw(), losses.resolve("importance_sampling")
    learner.forward_backward("run", batch, loss_fn, temperature=0.8)
    generator = torch.Generator().manual_seed(0)
    for name, weight in learner.runs["run"].parameters.items():
        assert weight.grad is not None
        direction = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        step, kept, values = 1e-5, weight.data.clone(), []
        for sign in (1, -1):
            weight.data = kept + sign * step * direction
            values.append(learner.forward("run", batch, loss_fn, temperature=0.8).loss_sum)
        weight.data = kept
        slope = (values[0] - values[1]) / (2 * step)
        assert slope == pytest.approx(float((weight.grad * direction).sum()), rel=1e-6), name


@pytest.mark.parametrize("tied", [True, False])
def test_all_weights_get_the_gradient_of_plain_transformers(tiny_model: Models, tied: bool) -> None:
    batch = draw()
    learner = make(tiny_model(tied), torch.float64, budget=30, chunk=5, trainable="all")
    learner.forward_backward(BASE_RUN, batch, losses.resolve("cross_entropy"))
    model = plain(tiny_model(tied))
    (-alone(model, batch) * torch.from_numpy(batch.columns["weights"])).sum().backward()
    wanted = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    assert_close(gradients(learner, BASE_RUN), wanted, 1e-10)


def test_temperature_divides_the_logits(tiny_model: Models) -> None:
    batch, loss_fn = draw(), losses.resolve("cross_entropy")
    learner = lend(tiny_model(True), torch.float64)
    flat = learner.forward(None, batch, loss_fn, temperature=1e6).logprobs
    np.testing.assert_allclose(flat, -np.log(64), rtol=1e-5)
    assert not np.allclose(learner.forward(None, batch, loss_fn).logprobs, -np.log(64), rtol=1e-2)


def test_logprobs_are_of_each_token_given_those_before_it(tiny_model: Models) -> None:
    batch = draw()
    found = lend(tiny_model(True), torch.float64, budget=30).logprobs(None, batch.tokens, batch.offsets)
    following = DatumBatch(batch.tokens, np.roll(batch.tokens, -1), batch.offsets, {})
    wanted = np.roll(reference(tiny_model(True), following), 1)
    wanted[batch.offsets[:-1]] = 0.0
    np.testing.assert_allclose(found, wanted, rtol=2e-7)


def test_a_new_adapter_and_no_adapter_are_the_base_to_the_bit(tiny_model: Models) -> None:
    batch = draw()
    bare = make(tiny_model(True)).logprobs(None, batch.tokens, batch.offsets)
    learner = make(tiny_model(True))
    learner.runs.create("new", ALL_TARGETS, 1)
    with_run(learner, run="other")
    assert np.array_equal(learner.logprobs(None, batch.tokens, batch.offsets), bare)
    assert np.array_equal(learner.logprobs("new", batch.tokens, batch.offsets), bare)
    assert not np.allclose(learner.logprobs("other", batch.tokens, batch.offsets), bare, atol=1e-2)
    assert np.array_equal(learner.logprobs(None, batch.tokens, batch.offsets), bare)


def test_a_step_is_adamw_in_closed_form(tiny_model: Models) -> None:
    learner = with_run(lend(tiny_model(True), torch.float64))
    moments = {name: (torch.zeros_like(weight), torch.zeros_like(weight)) for name, weight in weights(learner).items()}
    adams = [AdamParams(1e-2, 0.8, 0.9, 1e-8, 0.1), AdamParams(3e-3, 0.7, 0.95, 1e-6, 0.0, 0.5)]
    for count, adam in enumerate(adams, start=1):
        before = weights(learner)
        learner.forward_backward("run", draw(seed=count), losses.resolve("importance_sampling"))
        gradient = gradients(learner)
        norm = torch.stack([g.norm() for g in gradient.values()]).norm()
        assert learner.optim_step("run", adam)["grad_norm"] == pytest.approx(float(norm), rel=1e-12)
        scale = min(1.0, adam.grad_clip_norm / (float(norm) + 1e-6)) if adam.grad_clip_norm else 1.0
        unbias1, unbias2 = 1 - adam.beta1**count, 1 - adam.beta2**count
        for name, after in weights(learner).items():
            m, v = moments[name]
            g = gradient[name] * scale
            m = adam.beta1 * m + (1 - adam.beta1) * g
            v = adam.beta2 * v + (1 - adam.beta2) * g**2
            moments[name] = (m, v)
            update = (m / unbias1) / ((v / unbias2).sqrt() + adam.eps)
            wanted = before[name] * (1 - adam.learning_rate * adam.weight_decay) - adam.learning_rate * update
            torch.testing.assert_close(after, wanted, rtol=1e-9, atol=1e-12)
    assert learner.runs.version("run") == 2


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_learning_rate_zero_changes_nothing(tiny_model: Models, optimizer: str) -> None:
    learner = make(tiny_model(True), trainable="all", optimizer=optimizer)
    before = weights(learner, BASE_RUN)
    learner.forward_backward(BASE_RUN, draw(), losses.resolve("cross_entropy"))
    learner.optim_step(BASE_RUN, AdamParams(0.0, weight_decay=0.1))
    assert_same_bits(weights(learner, BASE_RUN), before)


def test_muon_takes_the_matrices_between_hidden_states_and_adamw_the_rest(tiny_model: Models) -> None:
    learner = make(tiny_model(False), trainable="all", optimizer="muon")
    names = {id(weight): name for name, weight in learner.runs[BASE_RUN].parameters.items()}
    taken = {
        type(part).__name__: {names[id(weight)] for group in part.param_groups for weight in group["params"]}
        for part in learner.runs[BASE_RUN].stepper.parts
    }
    assert taken["Muon"] | taken["AdamW"] == set(names.values())
    assert {name.rsplit(".", 2)[-2] for name in taken["Muon"]} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"} <= taken["AdamW"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_all_weights_learns_a_sequence_by_heart(tiny_model: Models, optimizer: str) -> None:
    learner = make(tiny_model(True), trainable="all", optimizer=optimizer)
    batch = take(draw(), [0, 1])
    results = []
    for _ in range(12):
        results.append(learner.forward_backward(BASE_RUN, batch, losses.resolve("cross_entropy")).loss_sum)
        learner.optim_step(BASE_RUN, AdamParams(1e-2))
    assert results[-1] < 0.2 * results[0]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_is_refused_and_leaves_every_bit(tiny_model: Models, bad: float) -> None:
    learner = with_run(lend(tiny_model(True)))
    batch, loss_fn = draw(), losses.resolve("importance_sampling")
    learner.forward_backward("run", batch, loss_fn)
    learner.optim_step("run", AdamParams())
    before = state(learner, "run")
    columns = {**batch.columns, "advantages": batch.columns["advantages"].copy()}
    columns["advantages"][batch.offsets[1] - 1] = bad
    learner.forward_backward("run", batch, loss_fn)
    learner.forward_backward("run", DatumBatch(batch.tokens, batch.targets, batch.offsets, columns), loss_fn)
    with pytest.raises(GradientError, match=r"run 'run', step 1: the gradient norm is (nan|inf).*learning rate"):
        learner.optim_step("run", AdamParams(grad_clip_norm=1.0))
    assert_same_bits(state(learner, "run"), before)
    assert learner.runs.version("run") == 1
    with pytest.raises(GradientError, match="no forward_backward since"):
        learner.optim_step("run", AdamParams())


def test_a_step_without_a_gradient_is_refused(tiny_model: Models) -> None:
    learner = with_run(lend(tiny_model(True)))
    with pytest.raises(GradientError, match="run 'run', step 0: no forward_backward"):
        learner.optim_step("run", AdamParams())


def test_a_failure_in_the_middle_leaves_the_accumulated_gradient_as_it_was(tiny_model: Models) -> None:
    learner = with_run(lend(tiny_model(True), budget=20))
    loss_fn = losses.resolve("importance_sampling")
    learner.forward_backward("run", draw(), loss_fn)
    before = gradients(learner)
    bad = draw(seed=5)
    bad.tokens[bad.offsets[int(bad.lengths.argmin())]] = 64  # out of the vocabulary, in the last micro-batch
    with pytest.raises(IndexError):
        learner.forward_backward("run", bad, loss_fn)
    assert_same_bits(gradients(learner), before)


def test_a_batch_without_datums_has_loss_zero_and_gradient_zero(tiny_model: Models) -> None:
    learner = with_run(lend(tiny_model(True)))
    result = learner.forward_backward("run", take(draw(), []), losses.resolve("importance_sampling"))
    assert result.loss_sum == 0.0
    assert len(result.logprobs) == 0
    assert learner.optim_step("run", AdamParams())["grad_norm"] == 0.0


def test_a_step_of_one_run_leaves_every_bit_of_another(tiny_model: Models) -> None:
    learner = with_run(lend(tiny_model(True)), run="one")
    with_run(learner, LoraSection(rank=2, alpha=3.0, train_mlp=False), run="two", seed=2)
    batch, loss_fn = draw(), losses.resolve("importance_sampling")
    for run in ("one", "two"):
        learner.forward_backward(run, batch, loss_fn)
        learner.optim_step(run, AdamParams(1e-2))
        learner.forward_backward(run, batch, loss_fn)
    before = state(learner, "one")
    learner.forward_backward("two", batch, loss_fn)
    learner.optim_step("two", AdamParams(1e-2))
    learner.probe("two", "float32", batch.tokens[:9])
    learner.runs.drop("two")
    assert_same_bits(state(learner, "one"), before)


def test_runs_side_by_side_end_as_each_alone(tiny_model: Models) -> None:
    sections = {"one": ALL_TARGETS, "two.b": LoraSection(rank=2, alpha=3.0, train_mlp=False)}

    def train(learner: Learner, runs: list[str]) -> None:
        for run in runs:
            learner.runs.create(run, sections[run], 3)
        for step in range(3):
            for run in runs:
                learner.forward_backward(run, draw(seed=step), losses.resolve("ppo"))
            for run in runs:
                learner.optim_step(run, AdamParams(1e-2))

    together = lend(tiny_model(True))
    train(together, list(sections))
    for run in sections:
        alone = lend(tiny_model(True))
        train(alone, [run])
        assert_same_bits(weights(together, run), weights(alone, run))


def test_the_same_seed_is_the_same_adapter_whatever_else_was_drawn(tiny_model: Models) -> None:
    learner = lend(tiny_model(True))
    torch.manual_seed(1)
    learner.runs.create("a", ALL_TARGETS, 5)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    learner.runs.create("b", ALL_TARGETS, 5)
    assert torch.equal(torch.get_rng_state(), before)
    learner.runs.create("c", ALL_TARGETS, 6)
    learner.runs.create("attention only", LoraSection(rank=4, alpha=8.0, train_mlp=False), 5)
    assert_same_bits(weights(learner, "a"), weights(learner, "b"))
    of_a, of_c, part = weights(learner, "a"), weights(learner, "c"), weights(learner, "attention only")
    assert all(torch.equal(of_a[name], part[name]) for name in part)
    assert not any(torch.equal(of_a[name], of_c[name]) for name in of_a if name.endswith("lora_A"))
    assert len({tuple(weight[0, :3].tolist()) for name, weight in of_a.items() if name.endswith("lora_A")}) == 15


def test_targets_are_what_the_section_says(tiny_model: Models) -> None:
    learner = lend(tiny_model(True))
    for field, wanted in (
        ("train_attn", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("train_mlp", {"gate_proj", "up_proj", "down_proj"}),
        ("train_unembed", {"lm_head"}),
    ):
        chosen = {"train_attn": False, "train_mlp": False, "train_unembed": False, field: True}
        learner.runs.create(field, LoraSection(**chosen), 0)
        assert {name.rsplit(".", 2)[-2] for name in weights(learner, field)} == wanted
    with pytest.raises(ConfigError, match="none of train_attn, train_mlp, train_unembed"):
        learner.runs.create("x", LoraSection(train_attn=False, train_mlp=False), 0)


def test_runs_that_exist_or_do_not_are_named(tiny_model: Models) -> None:
    learner = lend(tiny_model(True))
    with pytest.raises(ConfigError, match="'a' does not exist; no run exists yet"):
        learner.runs.version("a")
    learner.runs.create("a", ALL_TARGETS, 0)
    learner.runs.create("b", ALL_TARGETS, 0)
    with pytest.raises(ConfigError, match="'a' exists already; known: a, b"):
        learner.runs.create("a", ALL_TARGETS, 0)
    learner.runs.drop("a")
    for call in (learner.runs.version, learner.runs.drop, lambda run: learner.snapshot(run, "float32")):
        with pytest.raises(ConfigError, match="'a' does not exist; known: b"):
            call("a")
    learner.runs.create("a", ALL_TARGETS, 0)
    all_weights = make(tiny_model(True), trainable="all")
    with pytest.raises(ConfigError, match="no adapters"):
        all_weights.runs.create("a", ALL_TARGETS, 0)
    with pytest.raises(ConfigError, match="has no adapter"):
        all_weights.snapshot(BASE_RUN, "float32")


def test_a_snapshot_is_the_adapter_with_its_scale_in_b(tiny_model: Models) -> None:
    learner = with_run(lend(tiny_model(True)))
    snapshot = learner.snapshot("run", "float32")
    own, sent = weights(learner), tensors_of(snapshot)
    assert sent.keys() == own.keys()
    assert "model.layers.0.self_attn.q_proj.lora_A" in sent and "lm_head.lora_B" in sent
    for name in own:
        assert torch.equal(sent[name], own[name] * (2.0 if name.endswith("lora_B") else 1.0))
    assert (snapshot.run_id, snapshot.version, snapshot.rank) == ("run", 0, 4)
    assert sent["lm_head.lora_A"].shape == (4, 32) and sent["lm_head.lora_B"].shape == (64, 4)
    half = tensors_of(learner.snapshot("run", "bfloat16"))
    assert all(torch.equal(half[name], sent[name].bfloat16()) for name in sent)


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_adapter_gives_peft_the_same_logprobs(tiny_model: Models, tied: bool, tmp_path: Path) -> None:
    learner = with_run(lend(tiny_model(tied)))
    batch = take(draw(), [0])
    wanted = learner.logprobs("run", batch.tokens, batch.offsets)
    learner.runs.save_adapter("run", tmp_path / "adapter")
    assert sorted(file.name for file in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8.0, str(tiny_model(tied)))
    base = AutoModelForCausalLM.from_pretrained(tiny_model(tied), attn_implementation="eager")
    model = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    tokens = torch.from_numpy(batch.tokens.astype(np.int64))
    logp = torch.log_softmax(model(tokens[None]).logits[0], -1)[:-1].gather(1, tokens[1:, None])[:, 0]
    np.testing.assert_allclose(wanted[1:], logp.detach().numpy(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_is_loaded_by_transformers(tiny_model: Models, tied: bool, tmp_path: Path) -> None:
    learner = make(tiny_model(tied), trainable="all")
    batch = take(draw(), [0])
    learner.forward_backward(BASE_RUN, batch, losses.resolve("cross_entropy"))
    learner.optim_step(BASE_RUN, AdamParams(1e-2))
    learner.save_model(tmp_path / "model")
    wanted = learner.forward(BASE_RUN, batch, losses.resolve("cross_entropy")).logprobs
    np.testing.assert_allclose(reference(tmp_path / "model", batch, torch.float32), wanted, rtol=0, atol=2e-5)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (config["dtype"], config["tie_word_embeddings"]) == ("float32", tied)
    with pytest.raises(ConfigError, match="save_adapter"):
        make(tiny_model(tied)).save_model(tmp_path / "other")


def test_a_half_precision_base_has_adapters_in_fp32_and_a_model_saved_in_half(
    tiny_model: Models, tmp_path: Path
) -> None:
    path = tiny_model(True)
    half = ModelSection(path=str(path), dtype="bfloat16")
    learner = with_run(Learner(path, half, LearnerSection()))
    batch = draw()
    result = learner.forward_backward("run", batch, losses.resolve("importance_sampling"))
    assert {weight.dtype for weight in [*weights(learner).values(), *gradients(learner).values()]} == {torch.float32}
    exact = with_run(lend(path)).forward("run", batch, losses.resolve("importance_sampling"))
    assert 0 < np.abs(result.logprobs - exact.logprobs).mean() < 0.1
    whole = Learner(path, half, LearnerSection(), trainable="all")
    assert {weight.dtype for weight in weights(whole, BASE_RUN).values()} == {torch.float32}
    whole.save_model(tmp_path / "model")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").dtype == torch.bfloat16


def test_a_probe_is_far_from_the_base_and_leaves_no_trace(tiny_model: Models) -> None:
    learner = with_run(lend(tiny_model(True)))
    tokens, ends = draw().tokens[:20], np.array([0, 20])
    before = state(learner, "run")
    snapshot, probed, _ = learner.probe("run", "float32", tokens)
    assert np.abs(probed - learner.logprobs(None, tokens, ends)).mean() > 0.5
    assert {slot.name: slot.shape for slot in snapshot.layout} == {
        slot.name: slot.shape for slot in learner.snapshot("run", "float32").layout
    }
    again, *_ = learner.probe("run", "float32", tokens)
    assert again.digest == snapshot.digest
    assert_same_bits(state(learner, "run"), before)
    assert learner.runs.ids == ["run"]


def test_greedy_takes_the_likeliest_token_each_time(tiny_model: Models) -> None:
    learner = with_run(lend(tiny_model(True)))
    prompts = [np.array([5, 9, 11]), np.array([3]), np.array([8, 1, 2, 40, 7])]
    for run in (None, "run"):
        found = learner.greedy(prompts, 8, [17], run_id=run)
        for prompt, completion in zip(prompts, found, strict=True):
            assert 1 <= len(completion) <= 8
            assert 17 not in completion[:-1]
            assert len(completion) == 8 or completion[-1] == 17
            for at in (0, 1, len(completion) - 1):  # each of the 64 tokens as the next one
                tokens = np.concatenate([prompt, completion[:at]]).astype(np.int32)
                sequences = np.append(np.tile(tokens, (64, 1)), np.arange(64)[:, None], axis=1).astype(np.int32)
                logp = learner.logprobs(run, sequences.reshape(-1), np.arange(65) * (len(tokens) + 1))
                assert logp.reshape(64, -1)[:, -1].argmax() == completion[at]
    assert learner.logprobs(None, prompts[0], np.array([0, 3])).shape == (3,)  # packed again


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be loaded as a causal language model"):
        make(tmp_path)


def test_sizes_are_those_of_model_and_section(tiny_model: Models) -> None:
    path = tiny_model(True)
    assert make(path).vocab_size == 64
    assert make(path).max_length == 128
    assert Learner(path, ModelSection(path=str(path), max_length=50), LearnerSection()).max_length == 50


def test_progress_counts_micro_batches_and_steps(tiny_model: Models) -> None:
    learner = with_run(make(tiny_model(True), budget=1))
    assert learner.progress() == 0
    learner.forward_backward("run", draw(datums=3), losses.resolve("importance_sampling"))
    assert learner.progress() == 9  # each begun, passed forward, passed backward
    learner.optim_step("run", AdamParams())
    assert learner.progress() == 10
    learner.logprobs("run", draw(datums=2).tokens, draw(datums=2).offsets)
    assert learner.progress() == 14


def test_the_base_has_the_bytes_of_its_weights_whatever_runs_on_it(tiny_model: Models) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model(True))
    wanted = sum(weight.numel() * 4 for weight in model.parameters())
    assert base_bytes(make(tiny_model(True))) == wanted
    assert base_bytes(with_run(make(tiny_model(True)))) == wanted


def test_batches_of_the_same_datums_add_up(tiny_model: Models) -> None:
    """The gradient of a batch given twice is twice its gradient."""
    batch, loss_fn = draw(), losses.resolve("dro")
    once, twice = with_run(lend(tiny_model(True), torch.float64)), with_run(lend(tiny_model(True), torch.float64))
    once.forward_backward("run", batch, loss_fn)
    twice.forward_backward("run", concatenate([batch, batch]), loss_fn)
    assert_close(gradients(twice), {name: 2 * value for name, value in gradients(once).items()}, 1e-12)
