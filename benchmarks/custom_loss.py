"""Speed of a custom loss against the equivalent built-in loss: seconds of one ``forward_backward`` with each.

    python -m benchmarks.custom_loss [--dtype bfloat16] [--threads 2] [--repeats 5]

PPO's clipped ratio as ``losses.ppo`` and as a user's function of datums and log-probabilities through
``Learner.forward_backward_custom``, on a 54M Qwen3 shape. Two batches: one fits the token budget, one needs several
micro-batches. Held equal: model, adapter, sequences, budget, threads. The gradients are checked to be equal.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.learner import BUDGET, HIGH, LOW, drawn, ours
from benchmarks.prefix_sharing import gradient
from benchmarks.rows import Row, Target, by_turns, finish, seconds
from benchmarks.shapes import DTYPE, S54, write_model
from rlsys import losses
from rlsys.datums import DatumBatch, take
from rlsys.learner.learner import Learner
from rlsys.types import Datum, ModelInput

BUILT_IN, CUSTOM = "built-in", "custom"


def clipped(data: Sequence[Datum], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    """As a user writes it."""
    total = torch.zeros(())
    for datum, logp in zip(data, logprobs, strict=True):
        inputs = {key: torch.as_tensor(value) for key, value in datum.loss_fn_inputs.items()}
        ratio = (logp - inputs["logprobs"]).exp()
        gain = torch.minimum(ratio * inputs["advantages"], ratio.clamp(LOW, HIGH) * inputs["advantages"])
        total = total - (inputs["weights"] * gain).sum()
    return total, {}


def datums(batch: DatumBatch) -> list[Datum]:
    spans = [slice(a, b) for a, b in zip(batch.offsets[:-1], batch.offsets[1:], strict=True)]
    return [
        Datum(
            ModelInput.from_ints(batch.tokens[span]),
            {"target_tokens": batch.targets[span], **{key: column[span] for key, column in batch.columns.items()}},
        )
        for span in spans
    ]


def measure(learner: Learner, batch: DatumBatch, what: str, dtype: str, threads: int, repeats: int) -> Row:
    loss = losses.resolve("ppo", {"clip_low_threshold": LOW, "clip_high_threshold": HIGH})
    data = datums(batch)
    sides = {
        BUILT_IN: lambda: learner.forward_backward("run", batch, loss),
        CUSTOM: lambda: learner.forward_backward_custom("run", batch, data, clipped),
    }
    metrics = sides[CUSTOM]().metrics
    by_custom = gradient(learner)
    sides[BUILT_IN]()
    by_loss = gradient(learner)
    assert (by_custom - by_loss).norm() <= 1e-3 * by_loss.norm()
    found = by_turns({name: seconds(side) for name, side in sides.items()}, repeats, warmups=0)
    learner.runs.forget_gradient("run")
    return Row(
        f"custom_loss_{what}",
        f"custom loss, batch {'that fits the budget' if what == 'fits' else 'of several micro-batches'}, {dtype}",
        "python -m benchmarks.custom_loss",
        "s",
        found,
        [Target(CUSTOM, BUILT_IN, 1.1, "<=")],
        {
            "model": "54M Qwen3 shape",
            "dtype": dtype,
            "threads": threads,
            "token budget": BUDGET,
            "sequences": batch.num_datums,
            "tokens": len(batch.tokens),
            "form": "ppo",
        },
        {"metrics of the custom loss": dict(metrics)},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default=DTYPE)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--datums", type=int, default=32)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        write_model(Path(name), S54, arguments.dtype)
        learner = ours(Path(name), arguments.dtype, arguments.threads)
    batch = drawn(arguments.datums, S54["vocab_size"])
    fitting = (batch.lengths.cumsum() <= BUDGET).sum()
    for what, part in (("fits", take(batch, list(range(fitting)))), ("several", batch)):
        finish(measure(learner, part, what, arguments.dtype, arguments.threads, arguments.repeats))


if __name__ == "__main__":
    main()
