"""A GRPO step through HTTP and the official SDK against `rlsys.ServiceClient`.

The same code (`benchmarks/serve_calls.py`) runs on both sides: 16 prompts with 8 completions of 32 tokens,
importance_sampling, one AdamW step, and a sampling client of the new weights. Each side trains its own adapter.
"""

from __future__ import annotations

from statistics import median

from benchmarks import serve_calls as calls
from benchmarks.rows import Row, Target, by_turns, spread
from benchmarks.serve_setup import MODEL, Served
from rlsys import types

PARTS = ("sample_s", "learn_s", "sync_s")
FACTOR, CLIENT_S, MOST_S = 1.15, 0.12, 1.0
SDK, DIRECT = "SDK over HTTP", "ServiceClient"
WARMUPS = 2


def step(server: Served, repeats: int) -> Row:
    trainer = server.service.create_lora_training_client(MODEL, rank=calls.RANK, seed=1)
    sampler = trainer.save_weights_and_get_sampling_client()
    steps: list[calls.Step] = []
    other = server.sdk("step")

    def direct() -> float:
        nonlocal sampler
        found = calls.grpo_step(types, trainer, sampler, len(steps))
        steps.append(found)
        sampler = found.sampler
        return found.sample_s + found.learn_s + found.sync_s

    found = by_turns({DIRECT: direct, SDK: lambda: server.turn(other)}, repeats, WARMUPS)
    other.close()
    bound = [FACTOR * each + CLIENT_S for each in found[DIRECT]]
    limit = f"{FACTOR:g} x ServiceClient + {CLIENT_S:g} s"
    parts = {
        DIRECT: {name: median([getattr(each, name) for each in steps[WARMUPS:]]) for name in PARTS},
        SDK: {name: median([each[name] for each in other.turns[WARMUPS:]]) for name in (*PARTS, "client_cpu_s")},
    }
    return Row(
        name="serve_step",
        title=f"`rlsys serve`: one GRPO step, 2.9M model, {calls.MAX_TOKENS} tokens",
        command="serve step",
        unit="s",
        sides={**found, limit: bound, "limit": [MOST_S] * repeats},
        targets=[Target(SDK, limit, 1.0, "<="), Target(SDK, "limit", 1.0, "<=")],
        equal=server.about
        | {"prompts": calls.PROMPTS, "completions": calls.GROUP, "tokens": calls.MAX_TOKENS, "rank": calls.RANK},
        more={
            "parts_s": parts,
            "SDK / ServiceClient": spread([a / b for a, b in zip(found[SDK], found[DIRECT], strict=True)]),
        },
    )
