"""Many runs on one learner and one sampler."""

from __future__ import annotations

from typing import Any

import rlsys
from rlsys import types
from tests.waiting import FAR_S

PROMPT = types.ModelInput.from_ints([5, 900, 31_000, 7])
TARGETS = [
    {},
    {"train_mlp": False},
    {"train_attn": False},
    {"train_unembed": False},
]


def test_eight_runs_at_once_are_eight_runs_one_after_the_other(
    service: rlsys.ServiceClient, datum: types.Datum
) -> None:
    """Other ranks, targets and seeds; what a run computes is the same to the bit whoever trains beside it."""

    def runs() -> list[rlsys.TrainingClient]:
        return [
            service.create_lora_training_client("tiny", rank=1 + i, seed=i, **TARGETS[i % len(TARGETS)])
            for i in range(8)
        ]

    def step(client: rlsys.TrainingClient, i: int) -> list[rlsys.ApiFuture[Any]]:
        rate = types.AdamParams(learning_rate=1e-3 * (i + 1))
        return [client.forward_backward([datum], "cross_entropy"), client.optim_step(rate)]

    together = runs()
    in_flight = [[step(client, i) for i, client in enumerate(together)] for _ in range(3)]
    at_once = [[in_flight[s][i][0].result(FAR_S).loss for s in range(3)] for i in range(8)]
    at_once_norms = [[in_flight[s][i][1].result(FAR_S).metrics["grad_norm"] for s in range(3)] for i in range(8)]

    alone, alone_norms = [], []
    for i, client in enumerate(runs()):
        answers = [[future.result(FAR_S) for future in step(client, i)] for _ in range(3)]
        alone.append([passed.loss for passed, _ in answers])
        alone_norms.append([stepped.metrics["grad_norm"] for _, stepped in answers])
    assert at_once == alone and at_once_norms == alone_norms
    assert len({losses[-1] for losses in alone}) == 8

    samplers = [client.save_weights_and_get_sampling_client() for client in together]
    scores = [sampler.compute_logprobs(PROMPT) for sampler in samplers]
    assert len({tuple(score.result(FAR_S)) for score in scores}) == 8
