"""The learner on fake CUDA tensors, in a process of its own (test_fake_cuda.py): shapes, dtypes, devices and operators'
schemas of what runs on a GPU. A fake tensor has no values, so what decides by values is left out, each by name below.
Prints a line of JSON: what was run, and which operators it called.
"""

from __future__ import annotations

import collections
import itertools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch._subclasses.fake_tensor as fake
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3Config, Qwen3ForCausalLM

from rlsys import losses
from rlsys.config import LearnerSection, LoraSection, ModelSection
from rlsys.datums import DatumBatch
from rlsys.learner import learner as module
from rlsys.learner.packing import MicroBatch
from rlsys.modeling import attention, rms_norm
from rlsys.modeling.logprobs import AS_THEY_ARE
from rlsys.modeling.prefix_layout import ALONE, Segments
from rlsys.types import AdamParams, Array

VOCABULARY = 1024
LOSSES = ("cross_entropy", "importance_sampling", "ppo", "cispo", "dro")


class Watched(TorchDispatchMode):
    """Counts operators by name, and copies of values from device to device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


def mode() -> fake.FakeTensorMode:
    return fake.FakeTensorMode(allow_non_fake_inputs=True)


def attention_case(dtype: torch.dtype, window: int | None, softcap: float | None, sinks: bool) -> dict[str, Any]:
    """Forward and backward over a pack with a shared prompt."""
    watched = Watched()
    with mode(), watched:
        lengths, reads = np.array([70, 5, 1, 64]), np.array([ALONE, 0, 0, ALONE])
        segments = Segments(lengths, reads, torch.device("cuda"))
        tokens = int(lengths.sum())
        query, key, value = (
            torch.empty(1, heads, tokens, 64, device="cuda", dtype=dtype, requires_grad=True) for heads in (4, 2, 2)
        )
        aux = torch.empty(4, device="cuda", dtype=dtype, requires_grad=True) if sinks else None
        out, _ = attention.packed_attention(
            nn.Module(), query, key, value, None,
            sliding_window=window, softcap=softcap, s_aux=aux, rlsys_segments=segments,
        )  # fmt: skip
        assert (out.shape, out.dtype, out.device.type) == ((1, tokens, 4, 64), dtype, "cuda")
        out.sum().backward()
        for given in (query, key, value, *([] if aux is None else [aux])):
            assert given.grad is not None
            assert (given.grad.shape, given.grad.dtype, given.grad.device) == (given.shape, dtype, given.device)
    return {"attention": f"{dtype} window {window} cap {softcap} sinks {sinks}", "seen": dict(watched.seen)}


def batch(sequences: int = 9) -> DatumBatch:
    """Some sequences begin alike, so that prompts are shared."""
    random = np.random.default_rng(0)
    prompt = random.integers(1, VOCABULARY, 40)
    rows = [np.concatenate([prompt[: 40 - i % 2], random.integers(1, VOCABULARY, 5 + 7 * i)]) for i in range(sequences)]
    lengths = [len(row) - 1 for row in rows]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    total = int(offsets[-1])
    columns = {name: random.normal(size=total).astype(np.float32) for name in ("logprobs", "advantages")}
    columns["weights"] = (random.random(total) < 0.7).astype(np.float32)
    tokens, targets = (np.concatenate([row[cut] for row in rows]) for cut in (slice(-1), slice(1, None)))
    return DatumBatch(tokens.astype(np.int32), targets.astype(np.int32), offsets, columns)


def moved(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """nn.Module.to by new tensors: torch's own swaps the old ones, which it cannot do with fake ones."""
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    for inner in self.modules():
        for tensors in (inner._parameters, inner._buffers):
            for name, tensor in list(tensors.items()):
                if tensor is not None:
                    new = tensor.detach().to(device or tensor.device, dtype if tensor.is_floating_point() else None)
                    is_weight = isinstance(tensor, nn.Parameter)
                    tensors[name] = nn.Parameter(new, tensor.requires_grad) if is_weight else new  # type: ignore[assignment]
    return self


def without_values() -> None:
    """Take out what decides by values, which fake tensors lack."""

    def load(base: Any, loaded: torch.dtype, computing: torch.dtype, device: str) -> Any:
        """In the place of files: a model that is made on the device."""
        attention.register()
        config = Qwen3Config(
            hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
            head_dim=64, vocab_size=VOCABULARY, max_position_embeddings=4096, tie_word_embeddings=False,
            attn_implementation=attention.NAME,
        )  # fmt: skip
        torch.set_default_dtype(computing)
        try:
            with torch.device(device):
                model = Qwen3ForCausalLM(config)
        finally:
            torch.set_default_dtype(torch.float32)
        model.eval().requires_grad_(False)
        rms_norm.replace_norms(model)
        return model

    def scatter(micro: MicroBatch, column: Array, values: torch.Tensor) -> None:
        """In the place of the copy into numpy."""
        assert values.device.type == "cuda" and values.shape == (max(1, len(micro.index)),)
        values.detach().cpu()

    module.load_model = load  # type: ignore[attr-defined,assignment]  # loads files and proves packing by their gradients
    MicroBatch.scatter = scatter  # type: ignore[method-assign,assignment]
    module.fingerprint_of = lambda model: None  # type: ignore[attr-defined,assignment,return-value]  # hashes weights
    module.logit_transform = lambda model: AS_THEY_ARE  # type: ignore[attr-defined]  # compares logits
    nn.Module.to = moved  # type: ignore[assignment]
    torch.allclose = lambda *args, **kwargs: True  # a norm's fused form against its own
    module.float = lambda norm: 1.0  # type: ignore[attr-defined]  # reads the gradient's norm


def learner_case(dtype: str, calls: Sequence[tuple[str, str]], **section: Any) -> dict[str, Any]:
    """Losses, each with a way to choose positions, an optimizer step, log-probabilities with and without adapter, and a
    checkpoint there and back."""
    watched = Watched()
    with mode(), watched:
        unembed = section.pop("train_unembed", False)
        given = LearnerSection(num_gpus=1, token_budget=400, **section)
        learner = module.Learner("x", ModelSection(path="x", dtype=dtype, max_length=2048), given)
        learner.runs.create("run", LoraSection(rank=8, train_unembed=unembed), seed=1)
        data = batch()
        for name, where in calls:
            learner.forward_backward("run", data, losses.resolve(name, {}), 0.7, where=where)  # type: ignore[arg-type]
        parameters = learner.runs["run"].parameters
        for parameter in parameters.values():
            assert parameter.grad is not None
            assert parameter.grad.is_cuda and parameter.grad.dtype == parameter.dtype == torch.float32
        learner.optim_step("run", AdamParams(1e-3, weight_decay=0.01, grad_clip_norm=0.5))
        learner.logprobs("run", data.tokens, data.offsets)
        learner.logprobs(None, data.tokens, data.offsets)
        learner.runs.restore("run", learner.runs.state("run"))
        assert all(parameter.is_cuda for parameter in learner.runs["run"].parameters.values())
    return {"learner": f"{dtype} {section} unembed {unembed}", "seen": dict(watched.seen)}


def main() -> None:
    fake.init_gpu_context = lambda device: None  # type: ignore[assignment]  # there is no context to make
    torch.autograd.set_multithreading_enabled(False)  # a device's own thread would ask the driver
    without_values()
    results = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        results += [attention_case(dtype, *rest) for rest in ATTENTION]
    results += [learner_case(dtype, calls, **section) for dtype, calls, section in LEARNERS]
    print(json.dumps(results))


ATTENTION: tuple[tuple[int | None, float | None, bool], ...] = (
    (None, None, False),
    (16, None, False),
    (None, 30.0, False),
    (16, 30.0, False),
    (None, None, True),
    (16, None, True),
)
# A loss has log-probabilities in fp32 before it, whatever computed them: all five with one learner.
EACH = tuple(itertools.product(LOSSES, ("all", "weighted")))
BOTH_WAYS = (("importance_sampling", "all"), ("cross_entropy", "weighted"))
LEARNERS: tuple[tuple[str, tuple[tuple[str, str], ...], dict[str, Any]], ...] = (
    ("bfloat16", EACH, {}),
    ("bfloat16", BOTH_WAYS, {"gradient_checkpointing": True, "entropy": True}),
    ("bfloat16", BOTH_WAYS, {"train_unembed": True}),
    ("float32", BOTH_WAYS, {}),
)
