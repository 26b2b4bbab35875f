"""LoRA adapters (Hu et al. 2021, arXiv:2106.09685): several on one base, with PEFT.

Target modules are found by role (rlsys/modeling/module_roles.py), so fused modules are adapted without splitting. Names
of modules are those of the complete checkpoint, also if the base is its text part (rlsys/modeling/text_part.py). Inside
PEFT adapters are named "a0", "a1", ..., because PEFT's names cannot contain dots. Initial weights depend only on the
seed and the module's name: not on the global random state, on other adapters, or on the other target modules.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, LoraModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlsys.distributed.sharding import full_tensor
from rlsys.errors import ConfigError
from rlsys.modeling.lora_linear import lora_linear
from rlsys.modeling.module_roles import is_linear, names, roles_of
from rlsys.modeling.text_part import is_part, whole_name

if TYPE_CHECKING:
    from rlsys.config import LoraSection

_logger = logging.getLogger(__name__)

TARGETS = {"train_attn": "attention", "train_mlp": "mlp", "train_unembed": "unembedding"}  # option -> role


class Adapters:
    """The adapters of one base model. At most one is active; without an active one the model computes as the base."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._tuner: LoraModel | None = None
        self._layers: dict[str, LoraLayer] = {}  # module path in the complete checkpoint's model -> layer
        self._targets: dict[tuple[bool, ...], tuple[list[str], list[str]]] = {}  # by the section's options: see _found
        self._active: str | None = None
        self._count = 0

    def add(self, section: LoraSection, seed: int, dtype: torch.dtype) -> str:
        """Create an adapter, and return its name. A is uniform in +-1/sqrt(in) and B is 0, so outputs are the base's.

        Raises:
            ConfigError: the model has no target modules for this section.
        """
        paths, named = self._found(section)
        config = LoraConfig(
            r=section.rank,
            lora_alpha=section.alpha,  # PEFT's annotation is int, but any number works
            target_modules=named,
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
        )
        name = f"a{self._count}"
        self._count += 1
        self.activate(None)
        # PEFT's initial weights are replaced below, and must not advance the global random state. PEFT warns that an
        # adapter on a tied output layer cannot be merged; here it applies only to the output, not to the embedding.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
            if self._tuner is None:
                self._tuner = LoraModel(self._model, config, name)
                self._note_layers()
            elif all(whole_name(self._model, path) in self._layers for path in paths):
                self._add_to_layers(self._tuner, config, name, paths)
            else:
                self._tuner.peft_config[name] = config
                self._tuner.inject_adapter(self._model, name)
                self._note_layers()
        for path, layer in self._of(name).items():
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            bound = 1.0 / math.sqrt(a.shape[1])
            values = torch.empty(a.shape, dtype=torch.float32).uniform_(-bound, bound, generator=_generator(seed, path))
            a.data = values.to(a.device, dtype)
            b.data = torch.zeros_like(b, dtype=dtype)
        self._active = name  # a new adapter is trained, and the first one active
        self.activate(None)
        return name

    def drop(self, name: str) -> None:
        assert self._tuner is not None
        self.activate(None)
        for layer in self._of(name).values():
            layer.delete_adapter(name)
        del self._tuner.peft_config[name]

    def activate(self, name: str | None) -> None:
        """Use this adapter in subsequent forward passes; None: the base without an adapter.

        PEFT's set_adapter() visits the modules of all adapters; this visits those of the two that change.
        """
        if self._tuner is None or name == self._active:
            return
        active = [] if name is None else [name]
        for layer in self._layers.values():
            for changed in filter(None, (self._active, name)):
                if changed in layer.lora_A:
                    for part in (layer.lora_A[changed], layer.lora_B[changed]):
                        part.weight.requires_grad_(changed == name)
            layer._active_adapter = active
        self._tuner.active_adapter = active
        self._active = name

    def head(self) -> nn.Module:
        """The output layer with the active adapter; without an adapter on it, the base's module."""
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
        """As `parameters`, with the scale alpha / r multiplied into B, in the adapter's dtype."""
        scale = {path: layer.scaling[name] for path, layer in self._of(name).items()}
        return {
            key: weight.detach() * scale[key.removesuffix(".lora_B")] if key.endswith(".lora_B") else weight.detach()
            for key, weight in self.parameters(name).items()
        }

    def enlarge(self, name: str, size: float, seed: int) -> None:
        """Set B to random values such that the RMS of each weight delta is `size` times that of the weight."""
        for path, layer in self._of(name).items():
            b, base = layer.lora_B[name].weight, full_tensor(layer.get_base_layer().weight.detach())
            (rank, inputs), rms = layer.lora_A[name].weight.shape, float(base.float().square().mean().sqrt())
            spread = size * rms / layer.scaling[name] * math.sqrt(3.0 * inputs / rank)  # A's variance is 1 / (3 in)
            values = torch.randn(b.shape, generator=_generator(seed, f"{path}.lora_B"))
            b.data = (values * spread).to(b.device, b.dtype)

    def save(self, name: str, out: Path, base: str) -> None:
        """Write the adapter in PEFT's format, adapter_config.json and adapter_model.safetensors, in its dtype."""
        assert self._tuner is not None
        out.mkdir(parents=True, exist_ok=True)
        config = copy.copy(self._tuner.peft_config[name])
        config.base_model_name_or_path, config.inference_mode = base, True
        if is_part(self._model):  # short names would match modules of other parts too
            config.target_modules = _pattern(list(self._of(name)))
        config.save_pretrained(str(out))
        weights = {
            f"base_model.model.{key}.weight": weight.detach().cpu().contiguous()
            for key, weight in self.parameters(name).items()
        }
        save_file(weights, out / "adapter_model.safetensors", metadata={"format": "pt"})

    def _found(self, section: LoraSection) -> tuple[list[str], list[str]]:
        """Paths of the target modules, and how PEFT's configuration names them."""
        options = tuple(getattr(section, option) for option in TARGETS)
        if options not in self._targets:
            paths = target_paths(self._model, section)
            self._targets[options] = paths, _shortest(self._model, paths)
        return self._targets[options]

    def _note_layers(self) -> None:
        earlier = self._layers
        self._layers = {
            whole_name(self._model, path): layer
            for path, layer in self._model.named_modules()
            if isinstance(layer, LoraLayer)
        }
        _fuse({path: layer for path, layer in self._layers.items() if path not in earlier})

    def _add_to_layers(self, tuner: LoraModel, config: LoraConfig, name: str, paths: Sequence[str]) -> None:
        """As PEFT's inject_adapter() does it at modules that have adapters, without its searches of the model, which
        take longer with each adapter."""
        tuner.peft_config[name] = config
        for path in paths:
            layer, (parent, _, last) = self._layers[whole_name(self._model, path)], path.rpartition(".")
            tuner._create_and_replace(config, name, layer, last, self._model.get_submodule(parent), current_key=path)

    def _of(self, name: str) -> dict[str, LoraLayer]:
        return {path: layer for path, layer in self._layers.items() if name in layer.lora_A}


def target_paths(model: PreTrainedModel, section: LoraSection) -> list[str]:
    """Paths of the target modules of an adapter.

    Raises:
        ConfigError: no role is trained, or the model has no linear modules of a trained role.
    """
    wanted = [role for option, role in TARGETS.items() if getattr(section, option)]
    if not wanted:
        raise ConfigError(f"lora: found none of {', '.join(TARGETS)}; wanted at least one")
    found, kind = roles_of(model), type(model).__name__
    if "mlp" in wanted and found.experts is not None:
        raise ConfigError(
            f"lora.train_mlp: {kind} is a mixture of experts with stacked weights in {found.experts}, which adapters "
            "do not support; set lora.train_mlp=false to train only the attention"
        )
    for option, role in TARGETS.items():
        if role in wanted and not getattr(found, role):
            raise ConfigError(
                f"lora.{option}: {kind} has no linear modules with the role {role}; set lora.{option}=false"
            )
    return [path for role in wanted for path in getattr(found, role)]


def _shortest(model: PreTrainedModel, paths: Sequence[str]) -> list[str]:
    """Last parts of the paths if they match exactly these modules, as is usual in PEFT; otherwise the paths."""
    short = names(tuple(paths))
    named = [path for path, module in model.named_modules() if path.rpartition(".")[2] in short and is_linear(module)]
    return list(short) if sorted(named) == sorted(paths) else list(paths)


def _pattern(paths: Sequence[str]) -> str:
    """Regular expression for the full paths, with any layer number."""
    kinds = dict.fromkeys(re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(path)) for path in paths)
    return "|".join(kinds)


def _fuse(layers: Mapping[str, LoraLayer]) -> None:
    """Replace PEFT's forward of plain linear layers. Other layers keep PEFT's, and a log message names them."""
    unfused = []
    for path, layer in layers.items():
        if type(layer) is LoraLinear and type(layer.get_base_layer()) is nn.Linear:
            layer.forward = _Fused(layer)
        else:
            unfused.append(path)
    if unfused:
        _logger.warning("adapters on %s use PEFT's forward, which needs more time and memory", ", ".join(unfused))


class _Fused:
    """Forward of a LoRA layer. Reads the weights at each call, because the optimizer replaces them and a sharded base
    is complete only during the call."""

    def __init__(self, layer: LoraLinear) -> None:
        self._layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        layer = self._layer
        base = layer.get_base_layer()
        active = [name for name in layer.active_adapters if name in layer.lora_A]
        if not active:
            output: Tensor = base(x)
            return output
        (name,) = active
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        return lora_linear(x, base.weight, base.bias, a, b, layer.scaling[name])


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
