"""The client's side of the benchmarks of `rlsys serve`: one call of the official SDK per turn.

.clients/tinker-0.38.0/bin/python -m benchmarks.serve_sdk step|pass|token MODEL
"""

from __future__ import annotations

import os
import sys
import time

import tinker
from tinker import types

from benchmarks import serve_calls as calls
from benchmarks.sides import Turn


def main() -> None:
    what, model = sys.argv[1:]
    service = tinker.ServiceClient()
    turn = Turn()
    if what == "token":
        base = service.create_sampling_client(base_model=model)
        turn.over()
        while True:
            turn.wait()
            turn.over(value_s=calls.one_token(types, base))
    trainer = service.create_lora_training_client(base_model=model, rank=calls.RANK, seed=1)
    if what == "pass":
        data = calls.supervised(types)
        turn.over()
        while True:
            turn.wait()
            turn.over(value_s=calls.one_pass(trainer, data))
    sampler = trainer.save_weights_and_get_sampling_client()
    number = 0
    turn.over()
    while True:
        turn.wait()
        began, cpu = time.perf_counter(), time.process_time()
        found = calls.grpo_step(types, trainer, sampler, number)
        sampler, number = found.sampler, number + 1
        turn.over(
            value_s=time.perf_counter() - began,
            sample_s=found.sample_s,
            learn_s=found.learn_s,
            sync_s=found.sync_s,
            client_cpu_s=time.process_time() - cpu,
        )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # the benchmark is over
        os._exit(0)  # threads of the SDK outlive main
