"""vLLM's GPU worker with an end with its parent. Not run on a GPU yet."""

from __future__ import annotations

from vllm.v1.worker.gpu_worker import Worker

from rlsys.sampler.vllm.parent_process import exit_with_parent


class CudaWorker(Worker):
    """vLLM's own, whose process outlives an actor that was killed, and holds the GPU's memory then."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        exit_with_parent()
