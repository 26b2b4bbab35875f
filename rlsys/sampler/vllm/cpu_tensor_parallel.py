"""Several CPU workers for one engine, each with its part of every layer."""

from __future__ import annotations

import os

from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from rlsys.sampler.vllm.parent_process import die_with_parent


class CpuExecutor(MultiprocExecutor):
    """Workers are forked from the engine's process, which has vLLM imported and has run nothing yet."""

    def _init_executor(self) -> None:
        die_with_parent()  # the workers follow this process in the same way
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"  # spawned ones would import vLLM again, each for itself
        # Where one dies, another may spin in a sum that never comes: not 5 s of grace before anybody hears of it.
        os.environ["VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS"] = "2"
        super()._init_executor()
