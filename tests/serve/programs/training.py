"""Losses, forward, updates, custom losses, and batches that an SDK cuts into chunks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tinker import types

from tests.serve.programs import formulas
from tests.serve.programs.sdk import LOSSES, VERSION, datum, inputs_of, logprobs_of, wait
from tests.serve.programs.seen import MODEL, check, say, step

IDS = [11, 42, 7, 99, 23, 64, 31, 5]
OTHER = [3, 18, 77, 50]
# Gives the gradient of one batch a visible size: half of what the adapter can move in one step of this learning rate.
ADAM = types.AdamParams(learning_rate=1e-2, beta1=0.9, beta2=0.95, eps=1e-8)
EXACT, CLOSE = 1e-5, 1e-4  # the same computation; the same quantity computed in another way
CLIP = {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}


def supervised(ids: list[int] = IDS, weights: list[float] | None = None) -> types.Datum:
    return datum(ids[:-1], ids[1:], weights=weights if weights is not None else [0.0, 0.0] + [1.0] * (len(ids) - 3))


def sampled(p: Any, ids: list[int] = IDS, sign: float = 1.0, mask: bool = False) -> types.Datum:
    """Two prompt positions, then ratios to the policy below, within and above the usual bounds."""
    ratio = [0.0, 0.0, *(0.5, -0.4, 0.05, -0.02, 0.3, -0.15, 0.1)[: len(ids) - 3]]
    q = [0.0 if index < 2 else float(p[index]) - gap for index, gap in enumerate(ratio)]
    a = [0.0, 0.0, *(sign * each for each in (1.0, -0.7, 0.4, -1.2, 0.9, 0.3, -0.2)[: len(ids) - 3])]
    more = {"sequence_ratio_mask": [0.0, 0.0] + [1.0] * (len(ids) - 3)} if mask else {}
    return datum(ids[:-1], ids[1:], logprobs=q, advantages=a, **more)


def losses(client: Any, trainer: Any) -> None:
    plain = [supervised(), supervised(OTHER, [1.0, 0.5, -0.25])]
    with step("forward"):
        answer = wait(trainer.forward(plain, "cross_entropy"))
        p = logprobs_of(answer)
        check("a log-probability per target", [len(each) for each in p], [len(IDS) - 1, len(OTHER) - 1])
        check(
            "log-probabilities are those of a model",
            bool(all((each < 0).all() and np.isfinite(each).all() for each in p)),
            True,
        )
    with step("forward_backward without weights"):
        bare = datum(IDS[:-1], IDS[1:])
        answer = wait(trainer.forward_backward([bare], "cross_entropy"))
        check("cross_entropy without weights", answer.metrics["loss:sum"], float(-p[0].sum()), CLOSE)
    runs: list[tuple[str, dict[str, float]]] = [(loss, {}) for loss in LOSSES]
    runs += [("ppo", CLIP), ("cispo", CLIP), ("dro", {"beta": 0.5})]
    if "gspo" in LOSSES:
        runs.append(("gspo", {"clip_low_threshold": 0.95, "clip_high_threshold": 1.05}))
    for loss, config in runs:
        with step(f"forward_backward {loss} {config or ''}"):
            batch = plain if loss == "cross_entropy" else rl(loss, p)
            answer = wait(trainer.forward_backward(batch, loss, loss_fn_config=config or None))
            again = logprobs_of(answer)
            check(f"{loss}: log-probabilities are those of forward", np.concatenate(again), np.concatenate(p), EXACT)
            # the thresholds of gspo are nowhere documented: those of its paper
            own = {"clip_low_threshold": 1 - 3e-4, "clip_high_threshold": 1 + 4e-4} if loss == "gspo" else {}
            wanted = sum(
                formulas.of(loss, q, inputs_of(each), own | config) for q, each in zip(again, batch, strict=True)
            )
            check(f"{loss} {config or ''}: loss:sum is the formula's", answer.metrics["loss:sum"], wanted, CLOSE)
            check(
                f"{loss}: names of metrics have one colon",
                [each for each in answer.metrics if each.count(":") != 1],
                [],
            )
    with step("thresholds per token"):
        each = rl("ppo", p)[0]
        n = len(IDS) - 1
        bounds = {"clip_low_threshold": [0.97] * n, "clip_high_threshold": [1.0 + 0.02 * index for index in range(n)]}
        fields = {key: value.tolist() for key, value in inputs_of(each).items() if key != "target_tokens"}
        answer = wait(trainer.forward_backward([datum(IDS[:-1], IDS[1:], **fields, **bounds)], "ppo"))
        q, low, high = (
            logprobs_of(answer)[0],
            np.array(bounds["clip_low_threshold"]),
            np.array(bounds["clip_high_threshold"]),
        )
        ratio, a = np.exp(q - np.array(fields["logprobs"])), np.array(fields["advantages"])
        wanted = float(-np.minimum(ratio * a, np.clip(ratio, low, high) * a).sum())
        check("ppo: thresholds per token", answer.metrics["loss:sum"], wanted, CLOSE)
    with step("optim_step"):
        answer = wait(trainer.optim_step(ADAM))
        say(saw="optim_step metrics", metrics=answer.metrics if hasattr(answer, "metrics") else None)
        after = logprobs_of(wait(trainer.forward(plain, "cross_entropy")))
        check("optim_step changes the policy", bool(np.abs(after[0] - p[0]).max() > 1e-4), True)


def rl(loss: str, p: list[Any]) -> list[types.Datum]:
    mask = loss == "gspo"
    return [sampled(p[0], mask=mask), sampled(p[1], OTHER, sign=-1.0, mask=mask)]


def fresh(client: Any, rank: int = 8) -> Any:
    return wait(client.create_lora_training_client(base_model=MODEL, rank=rank, seed=5))


def after_step(trainer: Any, batch: list[types.Datum]) -> Any:
    wait(trainer.optim_step(ADAM))
    return np.concatenate(logprobs_of(wait(trainer.forward(batch, "cross_entropy"))))


def updates(client: Any, _: Any) -> None:
    """Gradients add up; the same seed starts the same; losses fall; a call does not wait for the one before."""
    batch = [supervised(IDS[k:] + IDS[:k]) for k in range(4)]
    with step("accumulate"):
        one, two = fresh(client), fresh(client)
        start = [np.concatenate(logprobs_of(wait(each.forward(batch, "cross_entropy")))) for each in (one, two)]
        check("the same seed starts the same", start[0], start[1], EXACT)
        whole = wait(one.forward_backward(batch, "cross_entropy"))
        halves = [wait(two.forward_backward(batch[k : k + 2], "cross_entropy")) for k in (0, 2)]
        check("losses add up", sum(each.metrics["loss:sum"] for each in halves), whole.metrics["loss:sum"], EXACT)
        check("gradients add up", after_step(two, batch), after_step(one, batch), CLOSE)
    with step("train without waiting"):
        futures = []
        for _index in range(5):
            futures += [one.forward_backward(batch, "cross_entropy"), one.optim_step(ADAM)]
        found = [wait(each).metrics["loss:sum"] for each in futures[::2]]
        for each in futures[1::2]:
            wait(each)
        say(saw="losses", losses=found)
        check("five steps lower the loss", bool(found[-1] < found[0]), True)
    with step("an optim_step without a gradient"):
        try:
            wait(fresh(client).optim_step(ADAM))
        except Exception as error:
            say(saw="optim_step without a gradient", text=f"{type(error).__name__}: {error}")
            check("it fails with a sentence", "no forward_backward since" in str(error), True)
        else:
            check("it fails with a sentence", "no error", "an error")


def custom(client: Any, _: Any) -> None:
    """A custom loss has the update of the built-in loss that it spells out."""
    batch = [supervised(), supervised(OTHER, [1.0, 0.5, -0.25])]

    def spelled(data: list[Any], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        weights = [torch.tensor(inputs_of(each)["weights"]) for each in data]
        loss = -sum(((w * p).sum() for w, p in zip(weights, logprobs, strict=True)), start=torch.tensor(0.0))
        return loss, {"spelled": float(loss.detach())}

    def pairwise(data: list[Any], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        loss = -torch.nn.functional.logsigmoid(0.1 * (logprobs[0].sum() - logprobs[1].sum()))
        return loss, {"dpo": float(loss.detach())}

    with step("forward_backward_custom"):
        one, two = fresh(client), fresh(client)
        built_in = wait(one.forward_backward(batch, "cross_entropy"))
        answer = wait(two.forward_backward_custom(batch, spelled))
        say(saw="custom metrics", metrics=answer.metrics)
        check("its metric is its value", answer.metrics["spelled"], built_in.metrics["loss:sum"], CLOSE)
        check("its update is that of cross_entropy", after_step(two, batch), after_step(one, batch), CLOSE)
    with step("forward_backward_custom over pairs"):
        p = logprobs_of(wait(two.forward(batch, "cross_entropy")))
        margin = 0.1 * (p[0].sum() - p[1].sum())
        answer = wait(two.forward_backward_custom(batch, pairwise))
        check("a loss over two datums", answer.metrics["dpo"], float(np.log1p(np.exp(-margin))), CLOSE)
        wait(two.optim_step(ADAM))
        p = logprobs_of(wait(two.forward(batch, "cross_entropy")))
        check("its step widens the margin", bool(0.1 * (p[0].sum() - p[1].sum()) > margin), True)


def chunks(client: Any, _: Any) -> None:
    """More datums than an SDK sends in one request; the answers come in the datums' order, and sums are sums."""
    count = 130 if VERSION < (0, 7) else 1030
    batch = [datum([index % 90 + 3, 17], [17, index % 70 + 5], weights=[0.0, 1.0]) for index in range(count)]
    with step(f"{count} datums"):
        trainer = fresh(client)
        answer = wait(trainer.forward_backward(batch, "cross_entropy"))
        p = logprobs_of(answer)
        check("an output per datum", len(p), count)
        check("loss:sum over chunks", answer.metrics["loss:sum"], float(-sum(each[1] for each in p)), CLOSE)
        some = [0, 1, count // 2, count - 3, count - 2, count - 1]
        alone = logprobs_of(wait(trainer.forward([batch[index] for index in some], "cross_entropy")))
        check(
            "outputs are in the datums' order",
            np.concatenate([p[index] for index in some]),
            np.concatenate(alone),
            EXACT,
        )
