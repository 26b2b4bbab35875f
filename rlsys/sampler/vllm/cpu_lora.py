"""LoRA on CPU without gathering A and B per token.

vLLM's CPU wrapper indexes the stacked adapters by token, so a batch of T tokens copies T adapters per layer. Here the
tokens of one adapter are taken together and multiplied by that adapter's own slot, cut to its rank:

    adapters of the tokens   7 7 . 9 7      (. is the base)
    blocks                   slot of 7: rows 0 1 4      slot of 9: row 3
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from rlsys.sampler.vllm.batch_invariance import filled
from rlsys.types import Array

if TYPE_CHECKING:
    from vllm.lora.layers import LoRAMapping


@dataclass(frozen=True, slots=True)
class Block:
    """The rows of a batch that one adapter owns; None for `rows` means all of them."""

    adapter: int
    slot: int
    rank: int
    rows: torch.Tensor | None


class SegmentedPunica(PunicaWrapperCPU):
    """One pair of matrix products per adapter and layer slice.

    The worker that installs adapters sets `ranks` and `unembedding`. An unknown adapter is multiplied at full slot
    width, which gives the same result, because slots are zero beyond the rank. An adapter whose B is all zero (before
    its first step, or when a base is evaluated) is skipped.
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.ranks: dict[int, int] = {}
        self.unembedding: set[int] = set()
        self.zero: set[int] = set()
        self._tokens: list[Block] = []
        self._samples: list[Block] = []
        self._slot_of: dict[int, int] = {}
        self._token_ids: Array = np.zeros(0, np.int64)
        self._prompt_hidden: torch.Tensor | None = None

    def update_metadata(
        self,
        mapping: LoRAMapping,
        lora_index_to_id: list[int | None],
        max_loras: int,
        vocab_size: int,
        **kwargs: object,
    ) -> None:
        """Sort this step's tokens, and the positions that are sampled, by adapter."""
        self._slot_of = {adapter: slot for slot, adapter in enumerate(lora_index_to_id) if adapter is not None}
        self._token_ids = np.asarray(mapping.index_mapping, np.int64)
        self._tokens = self._blocks(self._token_ids)
        self._samples = self._blocks(np.asarray(mapping.prompt_mapping, np.int64))

    def _blocks(self, adapters: Array) -> list[Block]:
        present = np.unique(adapters)
        return [
            Block(
                int(adapter),
                self._slot_of[int(adapter)],
                self.ranks.get(int(adapter), 0),
                None if len(present) == 1 else torch.from_numpy(np.flatnonzero(adapters == adapter)),
            )
            for adapter in present
            if adapter > 0 and int(adapter) not in self.zero
        ]

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[torch.Tensor, ...] | None = None,
        **kwargs: object,
    ) -> None:
        """y[rows] += scale * x[rows] @ A.T @ B.T for each block, slice by slice of a packed layer."""
        if not self._tokens:
            return
        _apply(self._tokens, y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1]), lora_a_stacked, lora_b_stacked, scale)

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        *,
        buffer: torch.Tensor | None = None,
        **kwargs: object,
    ) -> None:
        """The same for the unembedding, whose rows are the sampled positions or one request's prompt."""
        blocks = self._samples if self._prompt_hidden is None else self._prompt_blocks(x)
        known = self.ranks.keys() - self.unembedding  # of these adapters, what is in the slots is zero
        blocks = [block for block in blocks if block.adapter not in known]
        _apply(blocks, y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1]), (lora_a_stacked,), (lora_b_stacked,), scale)

    @contextmanager
    def prompt_logits(self, hidden: torch.Tensor) -> Iterator[None]:
        """While inside, logits are asked for slices of `hidden` (tokens of the step, width), one request at a time."""
        self._prompt_hidden = hidden
        try:
            yield
        finally:
            self._prompt_hidden = None

    def _prompt_blocks(self, x: torch.Tensor) -> list[Block]:
        # vLLM maps the unembedding's rows by sampled position, one per request, and so has no mapping for a prompt's
        # rows (stock vLLM dies on the mismatch). x is a slice of the step's hidden states: its place says whose it is.
        hidden = self._prompt_hidden
        assert hidden is not None and x.untyped_storage().data_ptr() == hidden.untyped_storage().data_ptr()
        first = (x.storage_offset() - hidden.storage_offset()) // hidden.stride(0)
        return self._blocks(self._token_ids[first : first + len(x)])


def _apply(
    blocks: Sequence[Block],
    y: torch.Tensor,
    x: torch.Tensor,
    a_stacked: tuple[torch.Tensor, ...],
    b_stacked: tuple[torch.Tensor, ...],
    scale: float,
) -> None:
    for block in blocks:
        mine = filled(x if block.rows is None else x[block.rows])
        rank = block.rank or a_stacked[0].shape[2]
        start = 0
        for a, b in zip(a_stacked, b_stacked, strict=True):
            out = y[:, start : start + b.shape[2]]
            start += b.shape[2]
            low = mine @ a[block.slot, 0, :rank].T
            up = b[block.slot, 0, :, :rank].T
            if block.rows is not None:
                out.index_add_(0, block.rows, (low @ up)[: len(block.rows)], alpha=scale)
            elif len(low) > len(out):
                out.add_((low @ up)[: len(out)], alpha=scale)
            else:
                out.addmm_(low, up, alpha=scale)
