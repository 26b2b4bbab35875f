"""Environment, imports and processes of an engine; the environment must be set before vLLM is imported."""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import forkserver
from typing import Literal

from rlsys.config import SamplerSection
from rlsys.sampler.private_api import check_private_api
from rlsys.sampler.vllm.text_only import register
from rlsys.sampler.vllm_build import Device as Device
from rlsys.sampler.vllm_build import refuse_other_vllm
from rlsys.utils.env_variables import set_default
from rlsys.utils.importing import without_collections
from rlsys.utils.openmp import openmp_variables

PRELOAD = (
    "rlsys.sampler.vllm.engine_logging",  # first: vLLM has few loggers yet, and all its modules take what it replaces
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.model_executor.layers.quantization.online.base",  # imported by every loader of weights
    "rlsys.sampler.vllm.cpu_worker",
    "rlsys.sampler.vllm.adapter_worker",
    "rlsys.sampler.vllm.cpu_kernels",  # last: it looks through all modules
)


def prepare_environment(section: SamplerSection, device: Device = "cpu") -> None:
    """Set what vLLM and torch read once. Call before either is imported; child processes inherit it."""
    os.environ |= openmp_variables(section.threads or 1)
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = (
        "1"  # see rlsys.sampler.engine_args: one position is allotted and never computed
    )
    set_default("VLLM_LOGGING_LEVEL", "ERROR")  # it warns at length of every choice made here
    if device == "cpu":
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # auto pins every engine to core 0
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # allows the worker inside the engine's process
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # nothing is compiled: no compiler needed, no 11 s first call
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # whole GiB only, and it would win over the section
    else:
        # vLLM chooses the V2 model runner here, which the CPU has not. What rlsys.sampler.vllm touches is in both, read
        # in their sources; neither was run on a GPU yet, so VLLM_USE_V2_MODEL_RUNNER stays the user's to set.
        # CUDA does not outlive a fork. vLLM spawns by itself where it sees that it must, as in a Ray actor. Outside of
        # one an engine's start was seen to end in "Cannot re-initialize CUDA in forked subprocess"
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"


def preload(device: Device = "cpu") -> None:
    """Import vLLM here and, on CPU, in the process from which the engine is forked, at the same time: a fork server,
    unless `preload_to_fork` was called in this process.

    Raises:
        ClusterError: a vLLM that is built for another device, or whose private API is another one.
    """
    refuse_other_vllm(device)
    if device == "cpu" and _starts.method == "forkserver":
        multiprocessing.set_forkserver_preload(list(PRELOAD))
        forkserver.ensure_running()
    importlib.import_module("vllm.v1.engine.async_llm")
    check_private_api(device)
    register()


def preload_to_fork(device: Device) -> None:
    """As `preload`, in a process whose only thread is the one that starts the engine: on CPU the engine is forked from
    this process."""
    if device != "cpu" or _starts.method == "fork":
        preload(device)
        return
    _starts.method = "fork"
    refuse_other_vllm(device)
    with without_collections():
        for module in PRELOAD:
            importlib.import_module(module)
        preload(device)
    gc.freeze()  # collections in the engine neither visit what is imported nor copy its pages


@dataclass
class _Starts:
    method: Literal["forkserver", "fork"] = "forkserver"  # of engines on CPU, in this process


_starts = _Starts()


@contextmanager
def engine_processes(device: Device) -> Iterator[None]:
    """While inside, vLLM forks its engine from a process that has vLLM imported, instead of a fresh interpreter.

    vLLM insists on `spawn` in a Ray actor and on CPU, and pays its import again. Not on CUDA, where a fork was never
    tried.
    """
    if device != "cpu":
        yield
        return
    import vllm.v1.engine.utils as utils

    stock = utils.get_mp_context
    utils.get_mp_context = lambda: multiprocessing.get_context(_starts.method)
    try:
        yield
    finally:
        utils.get_mp_context = stock
