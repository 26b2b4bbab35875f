"""What HTTP and the official SDK add to one forward_backward of 64 x 512 tokens and to a sample of one token.

Three sides: `rlsys.ServiceClient`, a client of the standard library over HTTP with protobuf bodies
(`benchmarks/serve_http.py`), and the SDK.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from statistics import median

from benchmarks import serve_calls as calls
from benchmarks.rows import Row, Target, by_turns
from benchmarks.serve_http import Http, supervised
from benchmarks.serve_setup import KEY, MODEL, Served
from rlsys import types

SDK, HTTP, DIRECT = "SDK", "HTTP", "ServiceClient"
MS = 1000.0


def one_pass(server: Served, repeats: int) -> Row:
    trainer = server.service.create_lora_training_client(MODEL, rank=calls.RANK, seed=1)
    data, http, sdk = calls.supervised(types), Http(server.url, KEY), server.sdk("pass")
    message = supervised(http.model(MODEL))
    found = by_turns(
        {
            DIRECT: lambda: calls.one_pass(trainer, data),
            HTTP: lambda: http.one_pass(message),
            SDK: lambda: server.turn(sdk),
        },
        repeats,
    )
    sdk.close()
    return Row(
        name="serve_pass",
        title=f"`rlsys serve`: one forward_backward of {calls.DATUMS} x {calls.LENGTH} tokens",
        command="serve pass",
        unit="s",
        sides=found,
        targets=[Target(HTTP, DIRECT, 1.15, "<="), Target(SDK, DIRECT, 1.15, "<=")],
        equal=server.about | {"bytes of the body": message.ByteSize()},
        more=shares(found),
    )


def one_token(server: Served, repeats: int) -> Row:
    sampler = server.service.create_sampling_client(base_model=MODEL)
    http, sdk, numbers = Http(server.url, KEY), server.sdk("token"), itertools.count()
    theirs = http.sampler(MODEL)
    found = by_turns(
        {
            DIRECT: lambda: calls.one_token(types, sampler) * MS,
            HTTP: lambda: median([http.one_token(theirs, next(numbers)) for _ in range(calls.TOKEN_REPEATS)]) * MS,
            SDK: lambda: server.turn(sdk) * MS,
        },
        repeats,
    )
    sdk.close()
    return Row(
        name="serve_token",
        title="`rlsys serve`: a sample of one token",
        command="serve token",
        unit="ms",
        sides=found,
        targets=[Target(HTTP, DIRECT, 1.5, "<="), Target(SDK, DIRECT, 2.0, "<=")],
        equal=server.about | {"samples of a repetition, of which the median counts": calls.TOKEN_REPEATS},
        more=shares(found),
    )


def shares(sides: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Share of a call's time beyond that of ServiceClient, of each way through HTTP."""
    return {
        f"share of {name} beyond {DIRECT}": round(
            median([1 - direct / each for each, direct in zip(sides[name], sides[DIRECT], strict=True)]), 4
        )
        for name in (HTTP, SDK)
    }
