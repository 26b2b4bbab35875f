"""Data-parallel learner ranks: shares of a batch, and sums over ranks.

Every rank gets the same batch and makes the same calls in the same order. It computes its share, and results are
combined by summing arrays that are zero outside a rank's share:

    rank 0   p p p . . . p p        rank 1   . . . p p p . .        both, afterwards   p p p p p p p p

A process is in one group at a time; it may leave and join another.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import os
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from urllib.parse import urlparse

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from rlsys.errors import ActorDiedError, ActorFailedError, ClusterError, StalledError
from rlsys.types import Array
from rlsys.utils.env_variables import env_variable, set_default
from rlsys.utils.gpu_errors import advised
from rlsys.utils.text_files import first_line

_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface
_FAILED, _OUT_OF_MEMORY = 1, 2  # status of a rank's share, summed over ranks


class _OutOfMemoryThereError(ActorFailedError):
    """Another rank is out of memory."""


class Ranks:
    """One process among the ranks. `ALONE` is a single process, which communicates with no other."""

    def __init__(self, rank: int = 0, size: int = 1, device: str = "cpu", timeout_s: float = 0.0) -> None:
        self.rank = rank
        self.size = size
        self.shards = False  # whether forward passes communicate, so that all ranks must run equally many
        self.device = torch.device(device)
        self._timeout_s = timeout_s

    @classmethod
    def join(cls, address: str, rank: int, size: int, device: str, timeout_s: float) -> Ranks:
        """Join the other ranks at ``tcp://ip:port``, which rank 0 opens; blocks until all have joined.

        `timeout_s` limits joining and every later wait for other ranks. gloo on cpu, nccl on cuda (not measured). A
        process that failed to join cannot join again: torch keeps counting from the group that was not formed.

        Raises:
            StalledError: not all ranks came within `timeout_s`.
            ClusterError: rank 0 cannot open the address.
        """
        ranks = cls(rank, size, device, timeout_s)
        if ranks.device.type == "cuda":
            set_default("TORCH_NCCL_BLOCKING_WAIT", "1")  # raise at the timeout instead of aborting the process
        else:
            _bind_gloo(urlparse(address).hostname or "")
        began = time.monotonic()
        try:
            dist.init_process_group(
                "nccl" if ranks.device.type == "cuda" else "gloo",
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
        """Leave the group. Does nothing without a group."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def shares(self, lengths_D: Array) -> list[Array]:
        """(n,) int64 datum numbers of each rank, ascending. Every datum is in one share; a share may be empty.

        The longest datum first, each to the rank with the fewest tokens so far: a function of the lengths alone, so
        all ranks get the same result.
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
        """(n,) int64 datum numbers of this rank's share."""
        return self.shares(lengths_D)[self.rank]

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Sum over ranks, in place, in one all_reduce; the same bits on all ranks. All tensors have one dtype.

        Raises:
            StalledError: another rank did not join the sum within the timeout.
            ActorDiedError: another rank has died.
        """
        if self.size == 1:
            return
        flat = torch.cat([tensor.detach().reshape(-1).to(self.device) for tensor in tensors])
        with self.guard("a sum over ranks"):
            dist.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.detach().copy_(total.view(tensor.shape))

    @contextmanager
    def joint(self, *arrays: Array) -> Iterator[None]:
        """Sum zero-initialized arrays of one dtype over ranks after the block, which fills this rank's share.

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
            # Sharded ranks are in the middle of a forward pass and would take this sum for a part of it.
            if not self.shards:
                failed[self.rank] = _OUT_OF_MEMORY if is_out_of_memory(error) else _FAILED
                with contextlib.suppress(StalledError, ActorFailedError):
                    self.sum_(parts)
                if is_out_of_memory(error) and (failed == _FAILED).any():
                    raise self._share_failed(failed) from error  # ranks retry together or not at all
            raise
        self.sum_(parts)
        if failed.any():
            raise self._share_failed(failed)

    def _share_failed(self, failed: Array) -> ActorFailedError:
        ranks = ", ".join(map(str, np.flatnonzero(failed)))
        where = f"learner rank {self.rank} of {self.size}: rank {ranks}"
        if (failed == _FAILED).any():
            return ActorFailedError(f"{where} failed in its share of the batch; see the error of that rank")
        return _OutOfMemoryThereError(f"{where} is out of memory in its share of the batch")

    @contextmanager
    def guard(self, what: str) -> Iterator[None]:
        """Translate errors of communication in the block into those of rlsys/errors.py."""
        began = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not _is_of_transport(error):
                raise
            waited = f"learner rank {self.rank} of {self.size}: {what}: after {time.monotonic() - began:.1f} s"
            if "timed out" in str(error).lower() or "timeout" in str(error).lower():
                raise StalledError(
                    f"{waited} another rank had not arrived (limit {self._timeout_s:g} s): {first_line(error)}"
                ) from error
            if any(text in str(error) for text in _MISPLACED):
                raise ActorFailedError(f"{waited} {advised(first_line(error), str(error), 'learner')}") from error
            raise ActorDiedError(
                f"{waited} another rank has died: {advised(first_line(error), str(error), 'learner')}"
            ) from error


ALONE = Ranks()


def _bind_gloo(host: str) -> None:
    """Make gloo use the interface that leads to `host`. By default it resolves the machine's name, which may give the
    loopback."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing
            address = probe.getsockname()[0]
    except OSError:
        return  # no route, or an IPv6 address: gloo chooses, and joining reports errors
    if env_variable("GLOO_SOCKET_IFNAME") is not None:
        return
    for _, name in socket.if_nameindex():
        if _address_of(name) == address:
            os.environ["GLOO_SOCKET_IFNAME"] = name


def _address_of(interface: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            reply = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError:
            return None  # no IPv4 address
    return socket.inet_ntoa(reply[20:24])


_OUT_OF_MEMORY_TEXTS = (  # of errors without a class in torch
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",  # from CUDA, not from torch's allocator
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Triton Error [CUDA]: out of memory",
)
_MISPLACED = ("Duplicate GPU detected", "no socket interface found")  # no rank has died, and a restart would not help


def _is_of_transport(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, dist.DistError) or "gloo" in text or "nccl" in text


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this process or another rank is out of memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError | _OutOfMemoryThereError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY_TEXTS)
