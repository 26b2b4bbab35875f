"""Checkpoints: save, load with and without the optimizer, create from them; and what a server refuses."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.serve.programs.sdk import VERSION, datum, logprobs_of, wait
from tests.serve.programs.seen import MODEL, check, refused, say, step
from tests.serve.programs.training import ADAM, CLOSE, EXACT, after_step, fresh, supervised

BATCH = [supervised()]


def train(trainer: Any, steps: int) -> None:
    for _ in range(steps):
        wait(trainer.forward_backward(BATCH, "cross_entropy"))
        wait(trainer.optim_step(ADAM))


def policy(trainer: Any) -> Any:
    return np.concatenate(logprobs_of(wait(trainer.forward(BATCH, "cross_entropy"))))


def next_step(trainer: Any) -> Any:
    wait(trainer.forward_backward(BATCH, "cross_entropy"))
    return after_step(trainer, BATCH)


def states(client: Any, _: Any) -> None:
    with step("save_state"):
        trainer = fresh(client)
        train(trainer, 3)
        saved = wait(trainer.save_state("three")).path
        say(saw="path", path=saved)
        check("a training checkpoint's path", saved.startswith("tinker://") and saved.endswith("/weights/three"), True)
        before = policy(trainer)
        goes_on = next_step(trainer)
    with step("create_training_client_from_state"):
        loaded = wait(client.create_training_client_from_state(saved))
        check("weights are those saved", policy(loaded), before, EXACT)
        fresh_adam = next_step(loaded)
        check("the optimizer starts fresh", bool(np.abs(fresh_adam - goes_on).max() > CLOSE), True)
        check("the rank is that saved", rank(loaded), 8)
    with step("load_state_with_optimizer"):
        other = fresh(client)
        wait(other.load_state_with_optimizer(saved))
        check("weights are those saved (load_state_with_optimizer)", policy(other), before, EXACT)
        check("its next step is that of the run itself", next_step(other), goes_on, EXACT)
    with step("load_state"):
        other = fresh(client)
        wait(other.load_state(saved))
        check("weights are those saved (load_state)", policy(other), before, EXACT)
        check("its next step is that of a fresh optimizer", next_step(other), fresh_adam, EXACT)
    if hasattr(client, "create_training_client_from_state_with_optimizer"):  # 0.15 on
        with step("create_training_client_from_state_with_optimizer"):
            loaded = wait(client.create_training_client_from_state_with_optimizer(saved))
            check("weights are those saved (with optimizer)", policy(loaded), before, EXACT)
            check("its next step is that of the run itself (with optimizer)", next_step(loaded), goes_on, EXACT)
            info = wait(loaded.get_info())
            check("a loaded model keeps its base", info.model_data.model_name, MODEL)
            again = wait(loaded.save_state("four")).path
            check("a loaded model saves under its own id", again, f"tinker://{info.model_id}/weights/four")
    with step("save twice"):
        refused("a name that exists is refused", ["three"], lambda: wait(trainer.save_state("three")))
        train(trainer, 1)
        if VERSION >= (0, 22):
            again = wait(trainer.save_state("three", overwrite=True)).path
            check("overwrite replaces it", again, saved)
            now = policy(trainer)
            check(
                "the path holds the new weights",
                policy(wait(client.create_training_client_from_state(saved))),
                now,
                EXACT,
            )


def rank(trainer: Any) -> Any:
    info = wait(trainer.get_info())
    return info.lora_rank if getattr(info, "lora_rank", None) is not None else info.model_data.lora_rank


def refusals(client: Any, trainer: Any) -> None:
    """Each refusal says what is wrong, and the client goes on as if the call had not been made."""
    ids = [5, 6, 7]
    before = policy(trainer)
    short = datum(ids, [6, 7])
    beyond = datum([5, 10**6], [6, 7])
    rl = datum(ids, [6, 7, 8], logprobs=[0.0, -1.0, -1.0])
    refused(
        "an unknown model",
        ["no-such-model"],
        lambda: wait(client.create_lora_training_client(base_model="no-such-model", rank=8)),
    )
    refused(
        "a rank beyond what is served",
        ["rank"],
        lambda: wait(client.create_lora_training_client(base_model=MODEL, rank=100_000)),
    )
    if VERSION >= (0, 18):  # older ones refuse it themselves, and leave out the number of the call
        refused("an unknown loss", ["no_such_loss"], lambda: wait(trainer.forward_backward(BATCH, "no_such_loss")))
    refused(
        "targets of another length",
        ["target_tokens"],
        lambda: wait(trainer.forward_backward([*BATCH, short], "cross_entropy")),
    )
    refused(
        "a token outside of the vocabulary",
        ["1000000"],
        lambda: wait(trainer.forward_backward([beyond], "cross_entropy")),
    )
    refused("a loss without its inputs", ["advantages"], lambda: wait(trainer.forward_backward([rl], "ppo")))
    refused(
        "a checkpoint that is not there",
        ["no-such"],
        lambda: wait(trainer.load_state("tinker://no-such:train:0/weights/x")),
    )
    refused("a folder of the server", [], lambda: wait(trainer.load_state("/etc/passwd")))
    refused("a name with a slash", [], lambda: wait(trainer.save_state("../x")))
    with step("after refusals"):
        check("refused calls change nothing", policy(trainer), before, EXACT)
        wait(trainer.forward_backward(BATCH, "cross_entropy"))
        wait(trainer.optim_step(ADAM))
        check("the client goes on", bool(np.abs(policy(trainer) - before).max() > 1e-5), True)
