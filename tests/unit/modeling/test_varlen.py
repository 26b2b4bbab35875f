"""The variable-length attention of a GPU, as mathematics: with its kernel written out in float64, which is what torch
documents of it, a pack gives what the two-part attention of the CPU gives, and so do its gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.attention.varlen as varlen_module
from torch import Tensor

from rlsys.modeling import attention_kernels as kernels
from rlsys.modeling.prefix_layout import ALONE, Segments

HEADS, KV_HEADS, SIZE = 4, 2, 32
PACKS = [
    # lengths of segments, and which one's tokens each reads besides its own
    ([200, 5, 1, 64, 130, 33], [ALONE, 0, 0, 0, 0, ALONE]),
    ([37, 5, 5, 128, 1, 70], [ALONE, 0, 0, ALONE, 3, 3]),
    ([1, 64, 65], [ALONE, ALONE, ALONE]),
    ([65, 1, 1, 1], [ALONE, 0, 0, 0]),
]


def documented(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """Each sequence's queries stand at the end of its keys; of a window (left, right) -1 is without end."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32, "the kernel takes offsets in int32"
    assert int(cu_seq_q[-1]) == len(query) and int(cu_seq_k[-1]) == len(key) == len(value)
    assert max_q == int(cu_seq_q.diff().max()) and max_k == int(cu_seq_k.diff().max())
    assert enable_gqa or query.shape[1] == key.shape[1]
    left, right = window_size
    share = query.shape[1] // key.shape[1]
    out = []
    for i in range(len(cu_seq_q) - 1):
        of_query, of_key = (slice(int(cu[i]), int(cu[i + 1])) for cu in (cu_seq_q, cu_seq_k))
        q = query[of_query].transpose(0, 1)
        k, v = (x[of_key].repeat_interleave(share, 1).transpose(0, 1) for x in (key, value))
        at = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
        ahead = torch.arange(k.shape[1])[None] - at  # of the query's own key
        hidden = ((ahead > right) if right >= 0 else torch.zeros_like(ahead, dtype=torch.bool)) | (
            (ahead < -left) if left >= 0 else torch.zeros_like(ahead, dtype=torch.bool)
        )
        scores = (q @ k.transpose(1, 2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
        out.append((scores.masked_fill(hidden, -math.inf).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("window", [None, 7, 64])
@pytest.mark.parametrize(("lengths", "reads"), PACKS, ids=["one prompt", "two prompts", "no prompt", "short readers"])
def test_a_pack_gives_what_the_cpu_s_attention_gives_and_so_do_its_gradients(
    lengths: Sequence[int], reads: Sequence[int], window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen_module, "varlen_attn", documented)
    segments = Segments(np.array(lengths), np.array(reads), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)

    def drawn(heads: int) -> Tensor:
        return torch.randn(sum(lengths), heads, SIZE, dtype=torch.float64, generator=generator)

    given = drawn(HEADS).requires_grad_(), drawn(KV_HEADS).requires_grad_(), drawn(KV_HEADS).requires_grad_()
    mix = drawn(HEADS)
    scale = SIZE**-0.5
    on_gpu = kernels.varlen(*given, segments, scale, window)
    if window is None:
        on_cpu = kernels.two_parts(*given, None, segments, scale)
    else:
        on_cpu = kernels.tiled(*given, None, segments, scale, window, None)
    for found, wanted in zip(
        (on_gpu, *torch.autograd.grad((on_gpu * mix).sum(), given)),
        (on_cpu, *torch.autograd.grad((on_cpu * mix).sum(), given)),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
