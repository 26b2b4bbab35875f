"""Data-parallel learner ranks: who takes which datums, sums over ranks, and a base shared out among them (FSDP2).

Every rank is given the same whole batch and does the same calls in the same order. It works on its share, and what the
ranks found is put together as sums of arrays that are zero where a rank has nothing:

    rank 0   p p p . . . p p        rank 1   . . . p p p . .        both, afterwards   p p p p p p p p

All of torch.distributed is here. A process is in one group at a time; it may leave and join another.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar
from urllib.parse import urlparse

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from rlsys.errors import ActorDiedError, ActorFailedError, ClusterError, ConfigError, StalledError
from rlsys.types import Array
from rlsys.utils.env_variables import env_variable, set_default
from rlsys.utils.gpu_errors import advised
from rlsys.utils.text_files import first_line

Found = TypeVar("Found")
_FORWARD = "rlsys_forward"  # a method of the sharded model that counts as its forward
_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface


_FAILED, _OUT_OF_MEMORY = 1, 2  # what a rank tells the others of its share


class _OutOfMemoryThereError(ActorFailedError):
    """Another rank is."""


class Ranks:
    """One process's place among the ranks. `ALONE` is the only one of a single process and communicates with nobody."""

    def __init__(self, rank: int = 0, size: int = 1, device: str = "cpu", timeout_s: float = 0.0) -> None:
        self.rank = rank
        self.size = size
        self.shards = False  # whether forward passes communicate, so that all ranks have to run as many
        self._device = torch.device(device)
        self._timeout_s = timeout_s

    @classmethod
    def join(cls, address: str, rank: int, size: int, device: str, timeout_s: float) -> Ranks:
        """Meet the other ranks at ``tcp://ip:port``, which rank 0 opens; blocks until all are there.

        `timeout_s` bounds the meeting and, later, every wait for the others. gloo on cpu, nccl on cuda (not measured).
        A process that has failed to join cannot join again: torch goes on counting from the group that never was.

        Raises:
            StalledError: not all ranks came within `timeout_s`.
            ClusterError: rank 0 cannot open the address.
        """
        ranks = cls(rank, size, device, timeout_s)
        if ranks._device.type == "cuda":
            set_default("TORCH_NCCL_BLOCKING_WAIT", "1")  # an exception at the timeout, not the end of all
        else:
            _bind_gloo(urlparse(address).hostname or "")
        began = time.monotonic()
        try:
            dist.init_process_group(
                "nccl" if ranks._device.type == "cuda" else "gloo",
                init_method=address,
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=timeout_s),
            )
        except (RuntimeError, ValueError) as error:
            if "EADDRINUSE" in str(error) or "already in use" in str(error):
                raise ClusterError(f"learner rank {rank}: {address} is taken; wanted a free port") from error
            raise StalledError(
                f"learner rank {rank} of {size}: not all ranks met at {address}; waited {time.monotonic() - began:.0f} "
                f"of {timeout_s:g} s: {first_line(error)}"
            ) from error
        return ranks

    def leave(self) -> None:
        """Give up the group; harmless when alone or gone already."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def shares(self, lengths_D: Array) -> list[Array]:
        """(n,) int64 datum numbers of each rank, ascending; every datum is in one share, which may be empty.

        The longest first, each to the rank with the fewest tokens so far: the same on all ranks, as nothing else
        decides.
        """
        if self.size == 1:
            return [np.arange(len(lengths_D), dtype=np.int64)]
        members: list[list[int]] = [[] for _ in range(self.size)]
        load = [(0, rank) for rank in range(self.size)]
        for datum in np.argsort(-np.asarray(lengths_D), kind="stable"):
            tokens, rank = load[0]
            members[rank].append(int(datum))
            heapq.heapreplace(load, (tokens + int(lengths_D[datum]), rank))
        return [np.sort(np.asarray(datums, np.int64)) for datums in members]

    def share(self, lengths_D: Array) -> Array:
        """(n,) int64 datum numbers of this rank."""
        return self.shares(lengths_D)[self.rank]

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Sum over ranks, in place, in one all_reduce; the same bits on all ranks. Tensors are of one dtype.

        Raises:
            StalledError: another rank did not come within the timeout.
            ActorDiedError: another rank is gone.
        """
        if self.size == 1:
            return
        flat = torch.cat([tensor.detach().reshape(-1).to(self._device) for tensor in tensors])
        with self.guard("a sum over ranks"):
            dist.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.detach().copy_(total.view(tensor.shape))

    @contextmanager
    def joint(self, *arrays: Array) -> Iterator[None]:
        """Arrays of one dtype, zero where others work: the block fills its part, then every rank has them whole.

        Raises:
            ActorFailedError: the block failed on another rank, which raises its own error.
        """
        if self.size == 1:
            yield
            return
        failed = np.zeros(self.size, arrays[0].dtype)
        parts = [torch.from_numpy(array) for array in (*arrays, failed)]
        try:
            yield
        except Exception as error:
            # Sharded ranks are in the midst of a forward pass and would take this sum for a part of it.
            if not self.shards:
                failed[self.rank] = _OUT_OF_MEMORY if is_out_of_memory(error) else _FAILED
                with contextlib.suppress(StalledError, ActorFailedError):
                    self.sum_(parts)
                if is_out_of_memory(error) and (failed == _FAILED).any():
                    raise self._share_failed(failed) from error  # no rank begins anew without the others
            raise
        self.sum_(parts)
        if failed.any():
            raise self._share_failed(failed)

    def _share_failed(self, failed: Array) -> ActorFailedError:
        ranks = ", ".join(map(str, np.flatnonzero(failed)))
        where = f"learner rank {self.rank} of {self.size}: rank {ranks}"
        if (failed == _FAILED).any():
            return ActorFailedError(f"{where} failed in its share of the batch; its own error says why")
        return _OutOfMemoryThereError(f"{where} is out of memory in its share of the batch")

    @contextmanager
    def guard(self, what: str) -> Iterator[None]:
        """Errors of communication inside the block as ours."""
        began = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not _is_of_transport(error):
                raise
            waited = f"learner rank {self.rank} of {self.size}: {what}: after {time.monotonic() - began:.1f} s"
            if "timed out" in str(error).lower() or "timeout" in str(error).lower():
                raise StalledError(
                    f"{waited} another rank had not come (limit {self._timeout_s:g} s): {first_line(error)}"
                ) from error
            if any(text in str(error) for text in _MISPLACED):
                raise ActorFailedError(f"{waited} {advised(first_line(error), str(error), 'learner')}") from error
            raise ActorDiedError(
                f"{waited} another rank is gone: {advised(first_line(error), str(error), 'learner')}"
            ) from error

    def shard(
        self, model: nn.Module, layers: Sequence[nn.Module], forward: Callable[..., Found]
    ) -> Callable[..., Found]:
        """Leave each rank its part of every parameter (FSDP2); returns `forward` as it has to be called from now on.

        A layer's parameters are whole only while it runs, those outside of layers during the whole of `forward`.
        Parameters added to the model later stay whole on every rank.
        """
        if self.size == 1:
            raise ConfigError("learner.shard_base: found one rank; wanted learner.num_workers of 2 or more")
        mesh = init_device_mesh(self._device.type, (self.size,))
        for module in (*layers, model):
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
        setattr(model, _FORWARD, forward)
        register_fsdp_forward_method(model, _FORWARD)
        self.shards = True
        sharded: Callable[..., Found] = getattr(model, _FORWARD)
        return sharded


ALONE = Ranks()


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that is on this rank: all of it where it is not sharded."""
    part: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return part


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; a sharded one is gathered, for which all ranks have to ask."""
    everything: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return everything


def _bind_gloo(host: str) -> None:
    """Let gloo use the interface that leads to `host`: by itself it takes the machine's name for its address, which
    may be the loopback."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing
            own = probe.getsockname()[0]
    except OSError:
        return  # no such route or an IPv6 address: gloo's own choice stands, and joining says what is wrong
    if env_variable("GLOO_SOCKET_IFNAME") is not None:
        return
    for _, name in socket.if_nameindex():
        if _address_of(name) == own:
            os.environ["GLOO_SOCKET_IFNAME"] = name


def _address_of(interface: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            reply = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError:
            return None  # it has no IPv4 address
    return socket.inet_ntoa(reply[20:24])


_OUT_OF_MEMORY_TEXTS = (  # where torch has no error of its own
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",  # of CUDA itself, beside torch's allocator
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Triton Error [CUDA]: out of memory",
)
_MISPLACED = ("Duplicate GPU detected", "no socket interface found")  # no rank has died, and a new one would not help


def _is_of_transport(error: Any) -> bool:
    text = str(error).lower()
    return isinstance(error, dist.DistError) or "gloo" in text or "nccl" in text


def is_out_of_memory(error: BaseException) -> bool:
    """Of this process or of another rank's."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError | _OutOfMemoryThereError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY_TEXTS)
