"""The learner's token budget, which gives way where memory does not suffice: an update that ran out of memory is made
again in smaller micro-batches, with the same sum as its result, and the budget stays at that size."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from rlsys.distributed.ranks import Ranks, is_out_of_memory
from rlsys.errors import ActorFailedError
from rlsys.utils.text_files import first_line

LEAST = 64  # tokens; smaller micro-batches save nothing beside the chunk of logits
_logger = logging.getLogger(__name__)
Result = TypeVar("Result")


class TokenBudget:
    """``tokens`` of one micro-batch, at most `most`."""

    def __init__(self, most: int, ranks: Ranks) -> None:
        self.most = self.tokens = most
        self._ranks = ranks

    def fitting(self, work: Callable[[], Result], instead: Callable[[], bool] = lambda: False) -> Result:
        """What `work` gives, which leaves nothing behind where it fails. Ranks are out of memory together, so that all
        of them begin anew. `instead` of a smaller budget may give up memory of its own, and says whether it did.

        Raises:
            ActorFailedError: a smaller budget would not help, or ranks that share a base are in the midst of a pass.
        """
        while True:
            try:
                return work()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if instead():
                    _logger.warning("out of memory: a custom loss keeps no graphs from now on, and runs forward twice")
                else:
                    smaller = self._smaller(error)
                    _logger.warning("out of memory: token budget %d -> %d from now on", self.tokens, smaller)
                    self.tokens = smaller
            gc.collect()  # the error's frames held on to tensors until here
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _smaller(self, error: Exception) -> int:
        if self._ranks.shards:
            raise ActorFailedError(
                f"learner: out of memory with a token budget of {self.tokens}, in the midst of a pass that all ranks "
                f"share; wanted a smaller learner.token_budget: {first_line(error)}"
            ) from error
        if self.tokens <= LEAST:
            raise ActorFailedError(
                f"learner: out of memory even with micro-batches of {self.tokens} tokens; wanted shorter sequences "
                "(model.max_length), learner.gradient_checkpointing, a smaller learner.logprob_chunk_tokens, or more "
                f"memory: {first_line(error)}"
            ) from error
        return max(LEAST, self.tokens // 2)
