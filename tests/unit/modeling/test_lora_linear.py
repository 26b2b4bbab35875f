"""The fused adapted layer is PEFT's own: values and gradients, with several adapters, and with none."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from rlsys import losses
from rlsys.config import LoraSection
from rlsys.modeling.lora import Adapters
from rlsys.modeling.lora_linear import lora_linear
from tests.unit.tiny_learner import ALL_TARGETS, Models, draw, make, with_run

SCALE = 1.7  # no power of two, so that the order of roundings would show
SHAPES = [(2, 5, 7, 3, 6), (1, 1, 16, 1, 4), (3, 2, 4, 16, 8)]  # batch, length, in, rank, out


def case(shape: tuple[int, ...], dtype: torch.dtype, trained: torch.dtype, bias: bool = False) -> dict[str, Any]:
    batch, length, inputs, rank, outputs = shape
    draw = torch.Generator().manual_seed(sum(shape))

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, dtype=torch.float64, generator=draw)

    return {
        "x": normal(batch, length, inputs).to(dtype).requires_grad_(),
        "weight": normal(outputs, inputs).to(dtype),
        "bias": normal(outputs).to(dtype) if bias else None,
        "a": normal(rank, inputs).to(trained).requires_grad_(),
        "b": normal(outputs, rank).to(trained).requires_grad_(),
        "scale": SCALE,
    }


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_its_gradients_are_those_of_finite_differences(shape: tuple[int, ...], bias: bool) -> None:
    inputs = case(shape, torch.float64, torch.float64, bias)
    assert torch.autograd.gradcheck(lora_linear, tuple(inputs.values()))


def two_models(path: Path, dtype: torch.dtype, trained: torch.dtype, sections: list[LoraSection]) -> list[Any]:
    """The same model with the same adapters: fused, and with PEFT's own forward."""
    found = []
    for fused in (True, False):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval().requires_grad_(False)
        adapters = Adapters(model)
        for seed, section in enumerate(sections):
            name = adapters.add(section, seed, trained)
            draw = torch.Generator().manual_seed(seed)
            for key, weight in adapters.parameters(name).items():
                if key.endswith(".lora_B"):
                    weight.data = (0.1 * torch.randn(weight.shape, dtype=torch.float64, generator=draw)).to(trained)
        layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        assert layers and all("forward" in vars(layer) for layer in layers)
        for layer in [] if fused else layers:
            del layer.forward  # PEFT's, of the class
        found.append((model, adapters))
    return found


def outcome(model: Any, adapters: Adapters, active: str | None) -> tuple[Tensor, dict[str, Tensor]]:
    adapters.activate(active)
    logits = model(torch.arange(24).view(2, 12)).logits
    if active is None:
        return logits, {}
    weights = adapters.parameters(active)
    upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float32)
    found = torch.autograd.grad(logits, list(weights.values()), upstream.to(logits.dtype))
    return logits, dict(zip(weights, found, strict=True))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_s_values_and_gradients_are_peft_s(
    tiny_model: Models, tied: bool, dtype: torch.dtype, bound: float
) -> None:
    sections = [ALL_TARGETS, LoraSection(rank=3, alpha=5.0, train_mlp=False), LoraSection(rank=8, train_attn=False)]
    (fused, ours), (plain, theirs) = two_models(tiny_model(tied), dtype, dtype, sections)
    for active in ("a0", "a1", "a2", None, "a0"):
        found, slopes = outcome(fused, ours, active)
        wanted, right = outcome(plain, theirs, active)
        assert (found - wanted).norm() <= bound * wanted.norm()
        assert slopes.keys() == right.keys()
        for name in right:
            assert slopes[name].dtype == right[name].dtype
            assert (slopes[name] - right[name]).norm() <= bound * right[name].norm(), name


def test_half_precision_is_as_near_to_float64_as_peft_is(tiny_model: Models) -> None:
    """Rounded elsewhere, not more: PEFT computes the adapter in fp32 and rounds the sum, here it is rounded first."""
    sections = [LoraSection(rank=4, alpha=8.0)]
    _, (exact, in_float64) = two_models(tiny_model(True), torch.float64, torch.float64, sections)
    wanted, right = outcome(exact, in_float64, "a0")
    errors = []
    for model, adapters in two_models(tiny_model(True), torch.bfloat16, torch.float32, sections):
        found, slopes = outcome(model, adapters, "a0")
        assert found.dtype == torch.bfloat16 and all(slope.dtype == torch.float32 for slope in slopes.values())
        pairs = [(found.detach(), wanted.detach()), *((slopes[name], right[name]) for name in right)]
        errors.append(torch.stack([(some.double() - best).norm() / best.norm() for some, best in pairs]))
    ours, theirs = errors
    assert ours.mean() <= 1.1 * theirs.mean()
    assert (ours <= 2 * theirs).all()


def test_what_is_kept_is_its_input_and_rank_sized_products() -> None:
    inputs = case((1, 64, 32, 4, 48), torch.bfloat16, torch.float32)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        lora_linear(**inputs)
    own = {inputs[key].untyped_storage().data_ptr() for key in ("x", "weight", "a", "b")}
    others = [tensor for tensor in kept if tensor.untyped_storage().data_ptr() not in own]
    assert [(tensor.shape, tensor.dtype) for tensor in others] == [((64, 4), torch.bfloat16)]


def test_no_tensor_of_inputs_is_cast_in_forward_or_backward() -> None:
    class Casts(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten._to_copy.default:
                self.largest = max(self.largest, out.numel())
            return out

    inputs = case((1, 64, 32, 4, 48), torch.bfloat16, torch.float32)
    with Casts() as casts:
        lora_linear(**inputs).sum().backward()
    assert casts.largest == 4 * 48  # B's


def test_a_frozen_base_of_ours_has_no_gradient_and_the_input_s_is_computed_only_where_wanted() -> None:
    inputs = case(SHAPES[0], torch.float32, torch.float32, bias=True)
    inputs["x"] = inputs["x"].detach()
    lora_linear(**inputs).sum().backward()
    assert inputs["x"].grad is None and inputs["weight"].grad is None and inputs["bias"].grad is None
    assert inputs["a"].grad.norm() > 0 and inputs["b"].grad.norm() > 0


def test_a_layer_of_another_kind_keeps_peft_s_forward_and_the_log_names_it(
    tiny_model: Models, caplog: pytest.LogCaptureFixture
) -> None:
    class Odd(nn.Linear):
        pass

    model = AutoModelForCausalLM.from_pretrained(tiny_model(True)).requires_grad_(False)
    first = model.model.layers[0].self_attn
    odd = Odd(first.o_proj.in_features, first.o_proj.out_features, bias=False)
    odd.load_state_dict(first.o_proj.state_dict())
    first.o_proj = odd
    adapters = Adapters(model)
    with caplog.at_level(logging.WARNING):
        adapters.add(LoraSection(rank=2), 0, torch.float32)
        adapters.add(LoraSection(rank=2), 1, torch.float32)
    assert caplog.text.count("model.layers.0.self_attn.o_proj") == 1 and "use PEFT's forward" in caplog.text
    assert isinstance(first.o_proj, LoraLinear) and "forward" not in vars(first.o_proj)
    assert "forward" in vars(model.model.layers[1].self_attn.o_proj)


def test_an_adapter_added_later_or_dropped_leaves_the_others_as_they_were(tiny_model: Models) -> None:
    learner, batch, loss = with_run(make(tiny_model(True))), draw(), losses.resolve("importance_sampling")
    before = learner.forward("run", batch, loss).logprobs
    with_run(learner, LoraSection(rank=2), "other", seed=9)
    other = learner.forward("other", batch, loss).logprobs
    bare = learner.forward(None, batch, loss).logprobs
    assert (learner.forward("run", batch, loss).logprobs == before).all()
    learner.runs.drop("run")
    assert (learner.forward("other", batch, loss).logprobs == other).all()
    assert (learner.forward(None, batch, loss).logprobs == bare).all()
    assert abs(before - bare).max() > 1e-3 < abs(other - bare).max()
