"""How clients share a learner: the waits of small requests beside a big one, and eight models at once.

- fairness: a client sends forward_backward of 64 x 512 tokens, one after another. Another one, from its own
  ServiceClient, sends forward_backward of one datum of 32 tokens, one after another, and its longest wait counts;
  beside that, the wait without the big client.
- eight_users: eight clients with one model each train at the same time, two steps of 4 x 512 tokens each, against the
  same steps one client after the other.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import rlsys
from benchmarks import serve_calls as calls
from benchmarks.rows import Row, Target, by_turns, seconds, spread
from benchmarks.serve_setup import MODEL, Served
from rlsys import types

SMALL_TOKENS, SMALL_REQUESTS = 32, 5
USERS, STEPS, DATUMS = 8, 2, 4
BESIDE, ALONE, BIG = "longest wait beside a big request", "longest wait alone", "a big request alone"
AT_ONCE, IN_SEQUENCE = "at once", "one after the other"


def fairness(server: Served, repeats: int) -> Row:
    with rlsys.ServiceClient(models={MODEL: server.service.config.models[MODEL]}) as other:
        big = server.service.create_lora_training_client(MODEL, rank=calls.RANK, seed=1)
        small = other.create_lora_training_client(MODEL, rank=calls.RANK, seed=2)
        data = calls.supervised(types)
        few = [_short(data[0])]
        busy: list[float] = []

        def beside() -> float:
            over = threading.Event()
            working = threading.Thread(target=_work_until, args=(over, big, data, busy))
            working.start()
            time.sleep(1.0)  # the big request is on the learner
            longest = max(calls.one_pass(small, few) for _ in range(SMALL_REQUESTS))
            over.set()
            working.join()
            return longest

        sides = {
            ALONE: lambda: max(calls.one_pass(small, few) for _ in range(SMALL_REQUESTS)),
            BIG: lambda: calls.one_pass(big, data),
            BESIDE: beside,
        }
        found = by_turns(sides, repeats)
    return Row(
        name="serve_fairness",
        title="`rlsys serve`: a request of 32 tokens beside one of 64 x 512 tokens",
        command="serve fairness",
        unit="s",
        sides=found,
        targets=[Target(BESIDE, BIG, 0.25, "<=")],
        equal=server.about | {"small requests of a repetition": SMALL_REQUESTS},
        more={"seconds of a big request beside the small ones": spread(busy)},
    )


def eight_users(server: Served, repeats: int) -> Row:
    with rlsys.ServiceClient(models={MODEL: server.service.config.models[MODEL]}) as other:
        trainers = [
            (other if i % 2 else server.service).create_lora_training_client(MODEL, rank=calls.RANK, seed=i)
            for i in range(USERS)
        ]
        data = calls.supervised(types)[:DATUMS]

        def at_once() -> None:
            threads = [threading.Thread(target=_train, args=(trainer, data)) for trainer in trainers]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        def in_sequence() -> None:
            for trainer in trainers:
                _train(trainer, data)

        found = by_turns({AT_ONCE: seconds(at_once), IN_SEQUENCE: seconds(in_sequence)}, repeats)
    return Row(
        name="serve_eight_users",
        title=f"`rlsys serve`: {USERS} models, {STEPS} steps of {DATUMS} x {calls.LENGTH} tokens each",
        command="serve eight_users",
        unit="s",
        sides=found,
        targets=[Target(AT_ONCE, IN_SEQUENCE, 1.05, "<=")],
        equal=server.about | {"models": USERS, "steps of each": STEPS},
    )


def _work_until(over: threading.Event, trainer: Any, data: list[Any], busy: list[float]) -> None:
    while not over.is_set():
        busy.append(calls.one_pass(trainer, data))


def _train(trainer: Any, data: list[Any]) -> None:
    for _ in range(STEPS):
        work = trainer.forward_backward(data, "cross_entropy")
        step = trainer.optim_step(types.AdamParams(learning_rate=calls.LEARNING_RATE))
        work.result(calls.LIMIT_S)
        step.result(calls.LIMIT_S)


def _short(datum: types.Datum) -> types.Datum:
    inputs = {key: types.to_array(value)[:SMALL_TOKENS] for key, value in datum.loss_fn_inputs.items()}
    return types.Datum(types.ModelInput.from_ints(datum.model_input.to_ints()[:SMALL_TOKENS]), inputs)
