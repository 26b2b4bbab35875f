"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) on one base, several at once, by PEFT.

Adapters are named "a0", "a1", ... inside PEFT, whose names may hold no dots. Initial weights depend on the seed and the
module's name alone: not on the global random state, on other adapters, or on which other modules are adapted.
"""

from __future__ import annotations

import hashlib
import logging
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, LoraModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlsys.adapted import adapted_linear
from rlsys.errors import ConfigError
from rlsys.ranks import whole

if TYPE_CHECKING:
    from rlsys.config import LoraSection

_logger = logging.getLogger(__name__)

TARGETS = {
    "train_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "train_mlp": ("gate_proj", "up_proj", "down_proj"),
    "train_unembed": ("lm_head",),
}


class Adapters:
    """The adapters of one base model; at most one is active, none means the bare base."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._tuner: LoraModel | None = None
        self._layers: dict[str, LoraLayer] = {}  # module path -> layer
        self._active: str | None = None
        self._count = 0

    def add(self, section: LoraSection, seed: int, dtype: torch.dtype) -> str:
        """A new adapter's name. A is uniform in +-1/sqrt(in), B is 0, so it begins as the base."""
        config = LoraConfig(
            r=section.rank,
            lora_alpha=section.alpha,  # PEFT says int and computes with any number
            target_modules=self._targets(section),
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
        )
        name = f"a{self._count}"
        self._count += 1
        # PEFT draws initial weights of its own, which are replaced here and must not move the global random state.
        # It warns that an adapter on a tied output layer cannot be merged into it: ours is meant for the output alone.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
            if self._tuner is None:
                self._tuner = LoraModel(self._model, config, name)
            else:
                self._tuner.peft_config[name] = config
                self._tuner.inject_adapter(self._model, name)
        earlier = self._layers
        self._layers = {path: layer for path, layer in self._model.named_modules() if isinstance(layer, LoraLayer)}
        _fuse({path: layer for path, layer in self._layers.items() if path not in earlier})
        for path, layer in self._of(name).items():
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            bound = 1.0 / math.sqrt(a.shape[1])
            drawn = torch.empty(a.shape, dtype=torch.float32).uniform_(-bound, bound, generator=_generator(seed, path))
            a.data = drawn.to(a.device, dtype)
            b.data = torch.zeros_like(b, dtype=dtype)
        self._active = name  # as PEFT has just made it
        self.activate(None)
        return name

    def drop(self, name: str) -> None:
        assert self._tuner is not None
        self.activate(None)
        self._tuner.delete_adapter(name)

    def activate(self, name: str | None) -> None:
        """Forward passes from now on go through this adapter alone; None: through the base alone."""
        if self._tuner is not None and name != self._active:
            self._tuner.set_adapter([] if name is None else name)
            self._active = name

    def head(self) -> nn.Module:
        """The output layer of the active adapter: the bare one where the adapter does not touch it."""
        head: nn.Module = self._model.get_output_embeddings()
        if isinstance(head, LoraLayer) and (self._active is None or self._active not in head.lora_A):
            head = head.get_base_layer()
        return head

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """``<module path>.lora_A`` (r, in) and ``.lora_B`` (out, r)."""
        found = {}
        for path, layer in self._of(name).items():
            found[f"{path}.lora_A"] = layer.lora_A[name].weight
            found[f"{path}.lora_B"] = layer.lora_B[name].weight
        return found

    def scaled(self, name: str) -> dict[str, Tensor]:
        """The same with alpha / r folded into B, in the adapter's own precision."""
        scale = {path: layer.scaling[name] for path, layer in self._of(name).items()}
        return {
            key: weight.detach() * scale[key.removesuffix(".lora_B")] if key.endswith(".lora_B") else weight.detach()
            for key, weight in self.parameters(name).items()
        }

    def enlarge(self, name: str, size: float, seed: int) -> None:
        """Draw B so that each delta is `size` times as large as the weight that it changes."""
        for path, layer in self._of(name).items():
            b, base = layer.lora_B[name].weight, whole(layer.get_base_layer().weight.detach())
            (rank, inputs), rms = layer.lora_A[name].weight.shape, float(base.float().square().mean().sqrt())
            spread = size * rms / layer.scaling[name] * math.sqrt(3.0 * inputs / rank)  # A's variance is 1 / (3 in)
            drawn = torch.randn(b.shape, generator=_generator(seed, f"{path}.lora_B"))
            b.data = (drawn * spread).to(b.device, b.dtype)

    def save(self, name: str, out: Path, base: str) -> None:
        """PEFT's layout: adapter_config.json and adapter_model.safetensors, in the adapter's own precision."""
        assert self._tuner is not None
        out.mkdir(parents=True, exist_ok=True)
        config = self._tuner.peft_config[name]
        config.base_model_name_or_path, config.inference_mode = base, True
        config.save_pretrained(str(out))
        weights = {
            f"base_model.model.{key}.weight": weight.detach().cpu().contiguous()
            for key, weight in self.parameters(name).items()
        }
        save_file(weights, out / "adapter_model.safetensors", metadata={"format": "pt"})

    def _of(self, name: str) -> dict[str, LoraLayer]:
        return {path: layer for path, layer in self._layers.items() if name in layer.lora_A}

    def _targets(self, section: LoraSection) -> list[str]:
        wanted = [name for kind, names in TARGETS.items() if getattr(section, kind) for name in names]
        if not wanted:
            raise ConfigError(f"lora: found none of {', '.join(TARGETS)}; wanted at least one, or nothing is trained")
        present = {path.rsplit(".", 1)[-1] for path, module in self._model.named_modules() if _is_linear(module)}
        missing = [name for name in wanted if name not in present]
        if missing:
            raise ConfigError(
                f"lora: {type(self._model).__name__} has no linear modules {', '.join(missing)}; "
                f"found {', '.join(sorted(present))}"
            )
        return wanted


def _fuse(layers: Mapping[str, LoraLayer]) -> None:
    """Replace PEFT's forward of layers that are plain linear ones; others keep it, and the log names them."""
    left = []
    for path, layer in layers.items():
        if type(layer) is LoraLinear and type(layer.get_base_layer()) is nn.Linear:
            layer.forward = _Fused(layer)
        else:
            left.append(path)
    if left:
        _logger.warning("adapters of %s run through PEFT's own forward, slower and larger", ", ".join(left))


class _Fused:
    """A layer's forward. It reads weights at each call: an optimizer changes them, and a base shared by ranks is whole
    only now."""

    def __init__(self, layer: LoraLinear) -> None:
        self._layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        layer = self._layer
        base = layer.get_base_layer()
        active = [name for name in layer.active_adapters if name in layer.lora_A]
        if not active:
            found: Tensor = base(x)
            return found
        (name,) = active
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        return adapted_linear(x, base.weight, base.bias, a, b, layer.scaling[name])


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (
        isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), nn.Linear)
    )


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
