"""Optimizers that take their settings with every step, and the gradient norm."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from rlsys.errors import CheckpointError
from rlsys.learner.muon import Muon
from rlsys.types import AdamParams

Kind = Literal["adamw", "muon"]

_MOMENTS = {torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"), Muon: ("momentum_buffer",)}


class Stepper:
    """AdamW (arXiv:1711.05101), or Muon (Liu et al. 2025, arXiv:2502.16982) for 2-D weights that map hidden states.

    Muon's update is scaled to AdamW's size, so both take the same learning rate. Embeddings, output layer, norms and
    biases stay with AdamW.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], kind: Kind, adamw_only: Collection[int] = ()) -> None:
        by_muon = [p for p in parameters.values() if kind == "muon" and p.ndim == 2 and id(p) not in adamw_only]
        muon_ids = {id(p) for p in by_muon}
        by_adamw = [p for p in parameters.values() if id(p) not in muon_ids]
        self.parts: list[torch.optim.Optimizer] = []
        if by_adamw:
            self.parts.append(torch.optim.AdamW(by_adamw, fused=True))
        if by_muon:
            self.parts.append(Muon(by_muon))
        self._homes = {name: (p, self.parts[-1 if id(p) in muon_ids else 0]) for name, p in parameters.items()}

    def step(self, adam: AdamParams) -> None:
        for part in self.parts:
            for group in part.param_groups:
                group["lr"], group["weight_decay"] = adam.learning_rate, adam.weight_decay
                if isinstance(part, torch.optim.AdamW):
                    group["betas"], group["eps"] = (adam.beta1, adam.beta2), adam.eps
            part.step()

    def state(self) -> dict[str, Tensor]:
        """``<parameter>.step``, ``.exp_avg``, ``.exp_avg_sq`` (Muon: ``.momentum_buffer``); empty before a step."""
        return {
            f"{name}.{key}": value
            for name, (weight, part) in self._homes.items()
            for key, value in part.state.get(weight, {}).items()
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Load copies of a state; parameters without one start from zero moments.

        Raises:
            CheckpointError: the state is not of this optimizer and these parameters. The optimizer is unchanged.
        """
        begun = {name.rpartition(".")[0] for name in state}
        wanted = {
            f"{name}.{key}": torch.zeros(()) if key == "step" else weight
            for name, (weight, part) in self._homes.items()
            for key in _MOMENTS[type(part)]
            if name in begun
        }
        require_like("optimizer state", state, wanted)
        for name, (weight, part) in self._homes.items():
            part.state.pop(weight, None)
            if name in begun:
                copies = {key: state[f"{name}.{key}"].to(weight.device, copy=True) for key in _MOMENTS[type(part)]}
                part.state[weight] = copies


def require_like(what: str, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Require the names, shapes and dtypes of `wanted`.

    Raises:
        CheckpointError: with the first difference.
    """
    odd = sorted(found.keys() ^ wanted.keys())
    if odd:
        raise CheckpointError(f"{what}: {odd[0]} is {'not expected' if odd[0] in found else 'missing'}")
    for name, tensor in wanted.items():
        given, asked = (f"{tuple(t.shape)} {t.dtype}" for t in (found[name], tensor))
        if given != asked:
            raise CheckpointError(f"{what}: {name}: found {given}; wanted {asked}")


def global_norm(gradients: list[Tensor]) -> Tensor:
    """L2 over all values, 0-dim."""
    return nn.utils.get_total_norm(gradients)


def clip(parameters: list[nn.Parameter], limit: float, norm: Tensor) -> None:
    """Scale the gradients to a norm of at most `limit`; with ``global_norm`` this is torch's clip_grad_norm_."""
    nn.utils.clip_grads_with_norm_(parameters, limit, norm)
