"""Token budget per micro-batch. After out-of-memory the update is retried with half the budget: the result is the same
sum, and the smaller budget is kept."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from rlsys.distributed.ranks import Ranks, is_out_of_memory
from rlsys.errors import ActorFailedError
from rlsys.learner.turns import Turns
from rlsys.utils.text_files import first_line

LEAST = 64  # tokens; below, the chunk of logits takes most memory
_logger = logging.getLogger(__name__)
Result = TypeVar("Result")


class TokenBudget:
    """``tokens`` of one micro-batch, at most `most`."""

    def __init__(self, most: int, ranks: Ranks) -> None:
        self.most = self.tokens = most
        self._ranks = ranks

    def fitting(self, work: Callable[[], Result], instead: Callable[[], bool] = lambda: False) -> Result:
        """Call `work` until it fits in memory. `work` must have no effect if it fails. If one rank runs out of memory,
        all ranks retry. `instead` is tried before a smaller budget: it may free memory, and returns whether it did.

        Raises:
            ActorFailedError: a smaller budget would not help, or ranks of a sharded base are in the middle of a pass.
        """
        while True:
            try:
                return work()
            except Exception as error:  # CUDA, cuBLAS and Triton report out of memory as several types
                self._reduce(error, instead)
            _free_memory()

    def fitting_turns(
        self, work: Callable[[], Turns[Result]], instead: Callable[[], bool] = lambda: False
    ) -> Turns[Result]:
        """As `fitting`, of a pass that pauses at micro-batch borders. A repeated pass begins from its first turn."""
        while True:
            try:
                return (yield from work())
            except Exception as error:
                self._reduce(error, instead)
            _free_memory()

    def _reduce(self, error: Exception, instead: Callable[[], bool]) -> None:
        """Use less memory from now on, or raise the error again."""
        if not is_out_of_memory(error):
            raise error
        if instead():
            _logger.warning("out of memory: custom losses keep no more graphs and run forward twice")
            return
        smaller = self._smaller(error)
        _logger.warning("out of memory: token budget reduced from %d to %d", self.tokens, smaller)
        self.tokens = smaller

    def _smaller(self, error: Exception) -> int:
        if self._ranks.shards:
            raise ActorFailedError(
                f"learner: out of memory with a token budget of {self.tokens}, in a pass that all ranks share, so it "
                f"cannot be retried; wanted a smaller learner.token_budget: {first_line(error)}"
            ) from error
        if self.tokens <= LEAST:
            raise ActorFailedError(
                f"learner: out of memory even with micro-batches of {self.tokens} tokens; wanted shorter sequences "
                "(model.max_length), learner.gradient_checkpointing, a smaller learner.logprob_chunk_tokens, or more "
                f"memory: {first_line(error)}"
            ) from error
        return max(LEAST, self.tokens // 2)


def _free_memory() -> None:
    gc.collect()  # tensors referenced by the error's frames
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
