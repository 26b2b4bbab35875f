"""Forward passes of the learner: log-probabilities of micro-batches and sequences under the active adapter, and greedy
decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from rlsys.datums import DatumBatch
from rlsys.distributed.ranks import Ranks
from rlsys.distributed.sharding import shard
from rlsys.learner.packing import MicroBatch, bins, filler, micro_batch, prefix_groups
from rlsys.learner.token_budget import TokenBudget
from rlsys.modeling import attention
from rlsys.modeling.logprobs import LogitTransform, logprobs_and_entropy, token_logprobs
from rlsys.modeling.lora import Adapters
from rlsys.types import Array

if TYPE_CHECKING:  # passes only read it: GPU checks run without pydantic
    from rlsys.config import LearnerSection


class Progress:
    """Counts passes begun and finished, and optimizer steps. Another thread reads `count` to see whether it grows."""

    def __init__(self) -> None:
        self.count = 0

    def advance(self) -> None:
        self.count += 1


class ForwardPass:
    """Packs batches into micro-batches of at most `budget` tokens and runs the model on them.

    `transform`: what the model does to its output layer's logits.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        adapters: Adapters,
        transform: LogitTransform,
        section: LearnerSection,
        budget: TokenBudget,
        ranks: Ranks,
        progress: Progress,
    ) -> None:
        self.model = model
        self.section = section
        self.budget = budget
        self._adapters, self._transform = adapters, transform
        self._ranks, self._progress = ranks, progress
        self._forward: Callable[[MicroBatch, float], tuple[Tensor, Tensor]] = self._compute

    def shard(self, layers: Sequence[nn.Module]) -> None:
        """Distribute the model's parameters over the ranks. Adapters added later stay complete on every rank."""
        self._forward = shard(self._ranks, self.model, layers, self._compute)

    def micro_batches(self, batch: DatumBatch, wanted_T: Array | None = None) -> list[MicroBatch]:
        """This rank's share of the batch. `wanted_T`: where log-probabilities are computed, None: everywhere.

        If forward passes communicate, fillers give every rank the same number of micro-batches.
        """
        return [micro for micro in self.micro_batches_by_turn(batch, wanted_T) if micro is not None]

    def micro_batches_by_turn(self, batch: DatumBatch, wanted_T: Array | None = None) -> list[MicroBatch | None]:
        """As `micro_batches`, of the same length on every rank: None where only other ranks have a micro-batch."""
        device, ranks = self.model.device, self._ranks
        # A prefix group above the even share of tokens would leave other ranks without work.
        limit = min(self.budget.tokens, -(-len(batch.tokens) // ranks.size))
        groups = prefix_groups(batch, wanted_T, limit, share=self.section.share_prompts)
        costs = np.array([group.cost for group in groups], np.int64)
        shares = [(share, bins(costs[share], self.budget.tokens)) for share in ranks.shares(costs)]
        share, packs = shares[ranks.rank]
        micros = [micro_batch(batch, [groups[share[i]] for i in pack], wanted_T, device) for pack in packs]
        missing = max(len(packs) for _, packs in shares) - len(micros)
        return [*micros, *[filler(device) if ranks.shards else None] * missing]

    def logprobs(self, micro: MicroBatch, temperature: float) -> Tensor:
        """(T,) nats of the micro-batch's targets."""
        return self.logprobs_and_entropy(micro, temperature)[0]

    def logprobs_and_entropy(self, micro: MicroBatch, temperature: float) -> tuple[Tensor, Tensor]:
        """(T,) nats of the targets, and (T,) nats of entropy if ``learner.entropy`` is set, else (0,)."""
        self._progress.advance()
        with self._ranks.guard("the forward pass"):
            result = self._forward(micro, temperature)
        self._progress.advance()
        return result

    def sequence_logprobs(self, tokens: Array, offsets: Array, temperature: float, only: Array | None) -> Array:
        """See ``Learner.logprobs``."""
        offsets = np.asarray(offsets, np.int64)
        predicted = np.zeros(len(tokens), bool)  # requested tokens that have tokens before them
        predicted[slice(None) if only is None else only] = True
        predicted[offsets[:-1][np.diff(offsets) > 0]] = False
        batch = DatumBatch(np.asarray(tokens), np.roll(tokens, -1), offsets, {})

        def work() -> Array:
            logprobs_T = np.zeros(len(tokens), np.float32)
            with self._ranks.joint(logprobs_T), torch.no_grad():
                for micro in self.micro_batches(batch, np.roll(predicted, -1)):
                    micro.scatter(logprobs_T, self.logprobs(micro, temperature).float())
            return np.roll(logprobs_T, 1)  # position t - 1 predicts token t

        return self.budget.fitting(work)

    def greedy(self, prompts: Sequence[Array], max_tokens: int, eos_ids: Sequence[int]) -> list[Array]:
        """See ``Learner.greedy``."""
        width = max(len(prompt) for prompt in prompts)
        ids = torch.zeros(len(prompts), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.from_numpy(np.asarray(prompt, np.int64))
            mask[row, width - len(prompt) :] = 1
        config = GenerationConfig(
            max_new_tokens=max_tokens, do_sample=False, eos_token_id=list(eos_ids), pad_token_id=0, use_cache=True
        )
        device = self.model.device
        with torch.no_grad(), unpacked(self.model), self._ranks.guard("greedy decoding"):
            out = self.model.generate(ids.to(device), attention_mask=mask.to(device), generation_config=config)
        return [_through_end(row, eos_ids) for row in out[:, width:].cpu().numpy()]

    def _compute(self, micro: MicroBatch, temperature: float) -> tuple[Tensor, Tensor]:
        hidden = self.model.base_model(
            input_ids=micro.tokens,
            position_ids=micro.positions,
            use_cache=False,
            **{attention.SEGMENTS: micro.segments},
        ).last_hidden_state[0]
        if micro.rows is not None:
            hidden = hidden.index_select(0, micro.rows)
        chunk = self.section.logprob_chunk_tokens
        arguments = (self._adapters.head(), hidden, micro.targets, temperature, chunk, self._transform)
        if self.section.entropy:
            return logprobs_and_entropy(*arguments)
        return token_logprobs(*arguments), hidden.new_zeros(0)


@contextmanager
def unpacked(model: PreTrainedModel, implementation: str | None = None) -> Iterator[None]:
    """Use one of transformers' own attention functions, which take padded rows and masks, not packed segments.

    None: sdpa, or eager for models with soft caps or sinks, which sdpa does not support.
    """
    config = model.config.get_text_config()
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    plain = capped or any(hasattr(module, "sinks") for module in model.modules())
    config._attn_implementation = implementation or ("eager" if plain else "sdpa")
    try:
        yield
    finally:
        config._attn_implementation = attention.NAME


def _through_end(row: Array, eos_ids: Sequence[int]) -> Array:
    """The row up to and including its first ending token."""
    ends = np.flatnonzero(np.isin(row, list(eos_ids)))
    return row[: ends[0] + 1 if len(ends) else len(row)].astype(np.int32)
