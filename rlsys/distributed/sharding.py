"""A base sharded over the learner ranks (FSDP2).

Each rank holds a part of every parameter. A layer's parameters are gathered while it runs; adapters are complete on
every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from rlsys.distributed.ranks import Ranks
from rlsys.errors import ConfigError

Result = TypeVar("Result")
_FORWARD = "rlsys_forward"  # a method of the sharded model that counts as its forward


def shard(
    ranks: Ranks, model: nn.Module, layers: Sequence[nn.Module], forward: Callable[..., Result]
) -> Callable[..., Result]:
    """Shard every parameter over the ranks. Returns the function to call in place of `forward`.

    A layer's parameters are gathered only while the layer runs, parameters outside of layers during all of `forward`.
    Parameters added to the model later are complete on every rank.

    Raises:
        ConfigError: there is only one rank.
    """
    if ranks.size == 1:
        raise ConfigError("learner.shard_base: found one rank; wanted learner.num_workers of 2 or more")
    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    for module in (*layers, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    setattr(model, _FORWARD, forward)
    register_fsdp_forward_method(model, _FORWARD)
    ranks.shards = True
    sharded: Callable[..., Result] = getattr(model, _FORWARD)
    return sharded


def full_tensor(tensor: Tensor) -> Tensor:
    """The complete tensor. A sharded tensor is gathered, so all ranks must call this."""
    full: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full
