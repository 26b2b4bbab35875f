"""The NVIDIA GPUs of this machine, and those of them that CUDA_VISIBLE_DEVICES leaves visible to a process."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from rlsys.architectures.precision import bfloat16_problem
from rlsys.errors import ClusterError, ConfigError
from rlsys.planning.fit import Node
from rlsys.utils.env_variables import env_variable
from rlsys.utils.free_memory import free_bytes

if TYPE_CHECKING:
    from actors.machine.gpu_query import Facts

NVML = "libnvidia-ml.so.1"  # comes with the driver
LIMIT_S = 60.0  # without persistence mode the driver initialises each GPU on the first query, seconds for each
# Codes of NVML that have a remedy of their own.
REMEDIES = {
    4: "this user may not open /dev/nvidia*: join the group that owns them, or start the container with --gpus all",
    9: "load the kernel module (`modprobe nvidia`), or install the NVIDIA driver again for this kernel",
    12: "install the NVIDIA driver",
    15: "the GPU has fallen off the bus: `dmesg | grep -i xid` says why; reboot the machine",
    16: "the GPU has to be reset: `nvidia-smi --gpu-reset`, or reboot the machine",
    18: "the driver was updated while it was loaded: reboot, or load the new kernel module",
    999: "in a container this follows a `systemctl daemon-reload` of the host: start the container again; else reboot",
}


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU, or one MIG instance of it."""

    index: int  # of the GPU, as nvidia-smi counts
    uuid: str
    name: str
    capability: tuple[int, int] | None
    total: int | None  # bytes; None where the driver does not tell, as with unified memory
    free: int | None
    instance: bool = False  # of MIG


@dataclass(frozen=True)
class Gpus:
    """What NVML says; `error` where it says nothing."""

    driver: str | None = None
    cuda: tuple[int, int] | None = None  # newest CUDA that the driver serves
    gpus: tuple[Gpu, ...] = ()  # without MIG instances
    instances: tuple[Gpu, ...] = ()
    in_mig_mode: frozenset[int] = frozenset()
    unavailable: frozenset[int] = frozenset()  # compute mode "prohibited"
    exclusive: frozenset[int] = frozenset()  # compute mode "exclusive process": learner and sampler cannot share it
    no_peer_access: tuple[tuple[int, int], ...] = ()
    error: str | None = None
    remedy: str = ""

    @cached_property
    def visible(self) -> Visible:
        return visible(os.environ.get("CUDA_VISIBLE_DEVICES"), self)


@dataclass(frozen=True, slots=True)
class Visible:
    """What CUDA shows a process, in its order."""

    gpus: tuple[Gpu, ...]
    problem: str | None = None  # why CUDA shows less than CUDA_VISIBLE_DEVICES names


def gpus() -> Gpus | None:
    """Of this machine; None without an NVIDIA driver."""
    try:
        ctypes.CDLL(NVML)  # loading initialises nothing
    except OSError:
        return None
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join([root, *filter(None, [env_variable("PYTHONPATH")])])
    command = [sys.executable, "-m", "actors.machine.gpu_query"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=LIMIT_S, env={**os.environ, "PYTHONPATH": path}
        )
    except subprocess.TimeoutExpired:
        return Gpus(error=f"NVML gave no answer within {LIMIT_S:g} s", remedy="`nvidia-smi` hangs too: reboot")
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        why = lines[-1] if lines else f"code {done.returncode}"
        return Gpus(error=f"the query of NVML failed: {why}", remedy="does `nvidia-smi` work? reinstall the driver")
    return parsed(json.loads(done.stdout.splitlines()[-1]))


def this_machine(num_cpus: int | None) -> Node:
    """The node that a job would start Ray on. `num_cpus` is cluster.num_cpus."""
    found = gpus()
    shown = () if found is None else found.visible.gpus
    memory = [gpu.total for gpu in shown if gpu.total is not None]
    cores = num_cpus or len(os.sched_getaffinity(0))
    resources = {"CPU": float(cores), **({"GPU": float(len(shown))} if shown else {})}
    return Node("this machine", resources, free_bytes(), min(memory) if len(memory) == len(shown) > 0 else None)


def gpus_for_ray() -> int | None:
    """Number of GPUs that a Ray started here may hand out: those that CUDA shows; None without an NVIDIA driver.

    Ray alone counts entries of CUDA_VISIBLE_DEVICES up to the number of GPUs: it takes -1 for a GPU, and two MIG
    instances of one GPU for one.

    Raises:
        ClusterError: CUDA would see less than CUDA_VISIBLE_DEVICES names, or the driver does not answer.
    """
    found = gpus()
    if found is None:
        return None
    if found.error is not None:
        raise ClusterError(f"GPUs: {found.error}; {found.remedy}; or CUDA_VISIBLE_DEVICES= to run on CPU alone")
    if found.visible.problem is not None:
        raise ClusterError(
            f"CUDA_VISIBLE_DEVICES {os.environ['CUDA_VISIBLE_DEVICES']!r}: {found.visible.problem}; name GPUs that "
            "`nvidia-smi -L` lists, or leave it empty to run on CPU alone"
        )
    return len(found.visible.gpus)


def refuse_dtype(dtype: str, who: str) -> None:
    """Before an actor loads its model, on the GPUs that Ray gave it.

    Raises:
        ConfigError: one of them does not compute in `dtype`.
    """
    found = gpus()
    for gpu in () if found is None else found.visible.gpus:
        problem = None if gpu.capability is None else bfloat16_problem(dtype, gpu.capability, gpu.name)
        if problem is not None:
            raise ConfigError(f"model.dtype {dtype}: {who}: {problem}")


def parsed(answer: Facts) -> Gpus:
    """Of the JSON that actors.machine.gpu_query prints."""
    if "error" in answer:
        return Gpus(
            error=f"NVML: {answer['error']}", remedy=REMEDIES.get(answer["code"], "does `nvidia-smi` work here?")
        )
    found = answer["gpus"]
    return Gpus(
        driver=answer["driver"],
        cuda=None if answer["cuda"] is None else (answer["cuda"] // 1000, answer["cuda"] % 1000 // 10),
        gpus=tuple(_gpu(one, one, instance=False) for one in found),
        instances=tuple(_gpu(one, part, instance=True) for one in found for part in one["instances"]),
        in_mig_mode=frozenset(one["index"] for one in found if one["mig"]),
        unavailable=frozenset(one["index"] for one in found if one["prohibited"]),
        exclusive=frozenset(one["index"] for one in found if one["exclusive"]),
        no_peer_access=tuple((one, two) for one, two in answer["no_peer_access"]),
    )


def _gpu(whole: Facts, part: Facts, instance: bool) -> Gpu:
    capability = whole["capability"] and (whole["capability"][0], whole["capability"][1])
    return Gpu(
        whole["index"], part["uuid"] or "", part["name"] or "", capability, part["total"], part["free"], instance
    )


def visible(wanted: str | None, found: Gpus) -> Visible:
    """Apply CUDA's rules for CUDA_VISIBLE_DEVICES. `wanted` is its value; None: all GPUs.

    Entries are indices, or UUIDs, or beginnings of UUIDs. An entry that names nothing ends the list; one that comes
    twice empties it.

    A GPU in MIG mode is visible as its first instance alone, and of several named instances CUDA serves the first in
    each process; Ray gives each actor one.
    """
    if wanted is None:
        return Visible(tuple(_as_served(gpu, found) for gpu in found.gpus if _serves(gpu, found)))
    entries = [entry.strip() for entry in wanted.split(",")]
    kind = next((prefix for prefix in ("GPU-", "MIG-") if entries[0].startswith(prefix)), "")
    known: Sequence[Gpu] = found.instances if kind == "MIG-" else found.gpus
    shown: list[Gpu] = []
    for at, entry in enumerate(entries):
        gpu = _named(entry, kind, known)
        if isinstance(gpu, str):
            if wanted.strip() in ("", "-1", "NoDevFiles"):  # the usual ways to hide all
                return Visible(())
            after = ", ".join(entries[at + 1 :])
            return Visible(tuple(shown), f"CUDA stops reading at {entry!r}: {gpu}{after and f'; {after} is ignored'}")
        if gpu in shown:
            return Visible((), f"{entry!r} is named twice, for which CUDA shows no GPU at all")
        if not _serves(gpu, found):
            return Visible(
                tuple(shown), f"{entry!r} is in MIG mode without instances, or its compute mode is prohibited"
            )
        shown.append(gpu)
    return Visible(tuple(_as_served(gpu, found) for gpu in shown))


def _named(entry: str, kind: str, known: Sequence[Gpu]) -> Gpu | str:
    """The GPU of one entry, or why there is none."""
    if not kind:
        if not entry.isdigit():
            return "it is no index of a GPU"
        if int(entry) >= len(known):
            return f"there are {len(known)} GPUs, 0 to {len(known) - 1}" if known else "there is no GPU"
        return known[int(entry)]
    if not entry.startswith(kind):
        return f"the list began with a name in {kind}..., and indices and UUIDs do not mix"
    matches = [gpu for gpu in known if gpu.uuid.startswith(entry)]
    if len(matches) != 1:
        names = ", ".join(gpu.uuid for gpu in known) or "none"
        return f"it names {len(matches)} GPUs here; there are {names}"
    return matches[0]


def _serves(gpu: Gpu, found: Gpus) -> bool:
    if gpu.index in found.unavailable:
        return False
    return gpu.instance or gpu.index not in found.in_mig_mode or any(one.index == gpu.index for one in found.instances)


def _as_served(gpu: Gpu, found: Gpus) -> Gpu:
    """The first instance of a GPU in MIG mode, else the GPU."""
    if gpu.instance or gpu.index not in found.in_mig_mode:
        return gpu
    return next(one for one in found.instances if one.index == gpu.index)
