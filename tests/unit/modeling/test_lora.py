"""Adapters beside each other on one base: which of them is trained, and what it costs to change that."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlsys.config import LoraSection
from rlsys.modeling.lora import Adapters
from tests.unit.tiny_learner import Models

ATTENTION = LoraSection(rank=2, train_mlp=False)
MLP = LoraSection(rank=3, train_attn=False)
ALL = LoraSection(rank=4, train_unembed=True)
MANY = 40


def base_of(path: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path).eval().requires_grad_(False)
    return model


def logits(model: PreTrainedModel) -> Tensor:
    found: Tensor = model(torch.arange(9)[None]).logits.detach()
    return found


@pytest.mark.parametrize("first", [ATTENTION, ALL], ids=["further layers later", "all layers at once"])
def test_the_active_adapter_alone_computes_and_is_trained_whatever_was_added_and_dropped(
    tiny_model: Models, first: LoraSection
) -> None:
    model = base_of(tiny_model(True))
    bare, adapters, outputs = logits(model), Adapters(model), dict[str, Tensor]()

    def check(active: str | None) -> None:
        adapters.activate(active)
        trained = {id(weight) for weight in model.parameters() if weight.requires_grad}
        own = {} if active is None else adapters.parameters(active)
        assert trained == {id(weight) for weight in own.values()}
        assert torch.equal(logits(model), bare if active is None else outputs[active])

    for seed, section in enumerate((first, MLP, ATTENTION, ALL)):
        name = adapters.add(section, seed, torch.float32)
        check(None)
        adapters.enlarge(name, 0.5, seed)
        adapters.activate(name)
        outputs[name] = logits(model)
        assert not any(torch.equal(outputs[name], other) for each, other in outputs.items() if each != name)
        for each in (*outputs, None, name):
            check(each)
    for name in list(outputs)[::2]:
        adapters.activate(name)
        adapters.drop(name)
        del outputs[name]
        for each in (None, *outputs):
            check(each)
    assert not [key for key, _ in model.named_parameters() if ".a0." in key or ".a2." in key]


def switching(adapters: Adapters, name: str) -> float:
    """CPU seconds of a few switches, the least of several measurements."""
    found = []
    for _ in range(5):
        began = time.process_time()
        for _ in range(5):
            adapters.activate(name)
            adapters.activate(None)
        found.append(time.process_time() - began)
    return min(found)


def test_to_switch_adapters_costs_no_more_beside_many(tiny_model: Models) -> None:
    adapters = Adapters(base_of(tiny_model(True)))
    name = adapters.add(ALL, 0, torch.float32)
    alone = switching(adapters, name)
    for seed in range(1, MANY):
        adapters.add(ALL, seed, torch.float32)
    assert switching(adapters, name) < 3 * alone
