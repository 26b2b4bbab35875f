"""A GRPO loop that outlives what kills its server: what was lost with a run is loaded from the last checkpoint.

    python -m tests.serve.programs.grpo_loop NAME STEPS

Prints each step with its loss and gradient norm, and each time that a run was lost. A loop that is not disturbed prints
the same steps: seeds are fixed.
"""

from __future__ import annotations

import random
import sys
import time
from typing import Any

import tinker
from tinker import types

from tests.serve.programs.sdk import datum, service, wait
from tests.serve.programs.seen import MODEL, end, say, step

PROBLEMS, SAMPLES, TOKENS = 2, 4, 8
GIVE_UP_S = 600.0
LOST = (tinker.TinkerError, ConnectionError, TimeoutError)


def main(name: str, steps: int) -> None:
    seed = sum(name.encode())
    client = service()
    trainer = wait(client.create_lora_training_client(base_model=MODEL, rank=8, seed=seed, train_unembed=False))
    saved = wait(trainer.save_state(f"{name}-0")).path
    done, began = 0, time.monotonic()
    while done < steps:
        try:
            moved = one_step(trainer, seed, done)
            path = wait(trainer.save_state(f"{name}-{done + 1}", overwrite=True)).path
        except LOST as error:
            if time.monotonic() - began > GIVE_UP_S:
                raise
            say(saw="a loss", step=done, kind=type(error).__name__, why=str(error)[:300])
            client, trainer = restored(client, saved, began)
            continue
        saved, done, began = path, done + 1, time.monotonic()
        say(saw="a step", step=done, **moved)


def restored(client: Any, saved: str, began: float) -> tuple[Any, Any]:
    """The run as it was at its last checkpoint, perhaps in a new session."""
    while True:
        try:
            return client, wait(client.create_training_client_from_state_with_optimizer(saved))
        except LOST as error:
            if time.monotonic() - began > GIVE_UP_S:
                raise
            say(saw="no way back yet", kind=type(error).__name__, why=str(error)[:300])
            time.sleep(1.0)
            client = service()


def one_step(trainer: Any, seed: int, done: int) -> dict[str, Any]:
    draw = random.Random(1000 * seed + done)
    sampler = wait(trainer.save_weights_and_get_sampling_client())
    prompts = [[draw.randrange(10, 200) for _ in range(5)] for _ in range(PROBLEMS)]
    params = types.SamplingParams(max_tokens=TOKENS, temperature=1.0, seed=seed + done)
    asked = [
        sampler.sample(types.ModelInput.from_ints(each), num_samples=SAMPLES, sampling_params=params)
        for each in prompts
    ]
    data, total = [], 0.0
    for prompt, future in zip(prompts, asked, strict=True):
        sequences = wait(future).sequences
        rewards = [sum(token % 2 for token in each.tokens) / TOKENS for each in sequences]
        mean = sum(rewards) / len(rewards)
        total += mean / PROBLEMS
        for each, reward in zip(sequences, rewards, strict=True):
            tokens, zeros = prompt + list(each.tokens), [0.0] * (len(prompt) - 1)
            n = len(each.tokens)
            logprobs, advantages = zeros + list(each.logprobs), zeros + [reward - mean] * n
            data.append(datum(tokens[:-1], tokens[1:], logprobs=logprobs, advantages=advantages))
    passed = trainer.forward_backward(data, "importance_sampling")
    stepped = trainer.optim_step(types.AdamParams(learning_rate=1e-4))
    metrics = wait(stepped).metrics
    assert "failed_forward_backward" not in metrics, "a step without its gradient"
    return {"reward": total, "loss": wait(passed).metrics["loss:sum"], "grad_norm": metrics["grad_norm"]}


if __name__ == "__main__":
    with step("loop"):
        main(sys.argv[1], int(sys.argv[2]))
    end()
