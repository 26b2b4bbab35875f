"""What benchmarks on a real model measure with: the same tokens on every side, full lengths, sums that are right."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from benchmarks.agreement import EAGER, LEARNER, OURS, SAMPLER, SDPA, Scored, by_transformers
from benchmarks.grpo_step import CASES, given, job
from benchmarks.learner import GROUP, as_grpo_has_them
from benchmarks.real import write_endless
from benchmarks.rows import Row, Target, by_turns, ratios, table
from examples.real_model import FOLDER
from rlsys.config import LoraSection, parse_config
from rlsys.data.problems import Problem, encode
from rlsys.tokenization.renderer import Renderer
from rlsys.tokenization.stop_conditions import load_tokenizer, stop_conditions_of
from tests.unit.tiny_learner import Models, make

needs_model = pytest.mark.skipif(not FOLDER.is_dir(), reason="needs models/SmolLM2-135M-Instruct: make real-model")


def test_a_slow_side_may_take_fewer_turns_and_ratios_are_of_the_common_ones(tmp_path: Path) -> None:
    turns = {"slow": iter([8.0, 9.0]), "fast": iter([1.0, 2.0, 4.0, 5.0])}
    found = by_turns({name: partial(next, turns[name]) for name in turns}, {"slow": 2, "fast": 3},
                     {"slow": 0, "fast": 1})  # fmt: skip
    assert found == {"slow": [8.0, 9.0], "fast": [2.0, 4.0, 5.0]}
    row = Row("r", "a row", "python -m benchmarks.r", "s", found, [Target("slow", "fast", 3.0, ">=")])
    assert ratios(row, row.targets[0]) == [4.0, 2.25]
    fields = {name: getattr(row, name) for name in ("name", "title", "command", "unit", "sides", "equal", "more")}
    target = {"of": "slow", "to": "fast", "bound": 3.0, "sense": ">="}
    written = {**fields, "targets": [target], "machine": {"processor": "a CPU", "revision": "abc"}}
    (tmp_path / "r.json").write_text(json.dumps(written))
    assert "slow 8.5 (8 to 9), 2 of 3 repetitions; fast 4 (2 to 5) s" in table(tmp_path)


@needs_model
def test_nothing_ends_a_completion_of_the_endless_copy(tmp_path: Path) -> None:
    assert stop_conditions_of(FOLDER).ids, "the model itself has ends"
    endless = write_endless(FOLDER, tmp_path / "endless")
    assert stop_conditions_of(endless).ids == ()
    rows = json.loads((endless / "config.json").read_text())["vocab_size"]
    assert load_tokenizer(endless).eos_token_id >= rows > load_tokenizer(endless).pad_token_id
    assert (endless / "model.safetensors").stat().st_size == (FOLDER / "model.safetensors").stat().st_size


@needs_model
def test_both_sides_of_a_real_grpo_step_read_the_same_prompt_tokens(tmp_path: Path) -> None:
    case = CASES["smollm2"]
    both = given(case, tmp_path, None)
    config = parse_config("{}", job(case, both, tmp_path / "runs", 1, []))
    assert config.rl.sampling.stop == []
    questions = json.loads(Path(config.task.options["file"]).read_text())
    ours = Renderer(load_tokenizer(both.model), config.prompt)
    theirs = AutoTokenizer.from_pretrained(both.model, padding_side="left")
    for question, text in zip(questions[:50], both.texts, strict=False):
        ids = theirs(text=[text])["input_ids"][0]
        assert ours.ids(question) == ids
        assert case.words[0] <= len(ids) <= case.words[1]


def test_sequences_of_a_grpo_step_share_their_groups_prompt_and_count_completions_alone(tiny_model: Models) -> None:
    random = np.random.default_rng(0)
    rows = [random.integers(1, 60, 6 + i).tolist() for i in range(9)]
    problems = encode([Problem(str(i), "") for i in range(9)], lambda _: rows)
    learner = make(tiny_model(True))
    batch = as_grpo_has_them(learner, problems, 2, 5)
    assert batch.num_datums == 2 * GROUP and batch.columns["weights"].sum() == 2 * GROUP * 5
    for datum in range(batch.num_datums):
        prompt, _ = problems.select([datum // GROUP])
        here = slice(batch.offsets[datum], batch.offsets[datum + 1])
        assert batch.tokens[here][: len(prompt)].tolist() == prompt.tolist()
        assert np.flatnonzero(batch.columns["weights"][here]).tolist() == list(range(len(prompt) - 1, len(prompt) + 4))
    whole = np.concatenate([batch.tokens[:1], batch.targets[: batch.offsets[1]]])
    p = learner.logprobs(None, whole, np.array([0, len(whole)]))[1:]
    q, counts = batch.columns["logprobs"][: len(p)], batch.columns["weights"][: len(p)] != 0
    assert 0.0 < np.abs(p - q)[counts].mean() < 0.3


def test_transformers_scores_the_tokens_that_the_learner_scores(tiny_model: Models, tmp_path: Path) -> None:
    learner = make(tiny_model(True))
    learner.runs.create("run", LoraSection(rank=4), 0)
    state = learner.runs.state("run")
    for name, weight in state.weights.items():
        if name.endswith("lora_B"):
            weight += torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * 0.1
    learner.runs.save_adapter("run", tmp_path)
    tokens = np.random.default_rng(0).integers(1, 60, 40).astype(np.int32)
    offsets = np.array([0, 25, 40])
    p, base = learner.logprobs("run", tokens, offsets), learner.logprobs(None, tokens, offsets)
    assert np.abs(p - base).mean() > 1e-2, "the adapter has moved"
    for kernel in (SDPA, EAGER):
        assert np.abs(by_transformers(tiny_model(True), tmp_path, "float32", kernel, tokens, offsets) - p).max() < 1e-4


def test_distances_are_told_by_position_and_by_completion() -> None:
    offsets, sampled = np.array([0, 100, 103]), np.zeros(103, bool)
    sampled[60:100], sampled[102] = True, True
    q = np.zeros(103, np.float32)
    p = np.where(np.arange(103) < 64, 1.0, 3.0).astype(np.float32)
    p[102] = 7.0
    every = {SAMPLER: q, LEARNER: p, SDPA: q, EAGER: q}
    scored = Scored(0, np.zeros(103, np.int32), offsets, sampled, every)
    found = scored.by_position()
    assert {span: (cells["tokens"], cells[OURS]) for span, cells in found.items()} == {
        "prompt 0-64": (59 + 1, {"mean": (59 * 1.0 + 3.0) / 60, "max": 3.0}),
        "completion 0-64": (4 + 1, {"mean": (4 * 1.0 + 7.0) / 5, "max": 7.0}),
        "completion 64-256": (36, {"mean": 3.0, "max": 3.0}),
    }
    assert scored.by_completion(LEARNER, SAMPLER) == [(4 * 1.0 + 36 * 3.0) / 40, 7.0]
