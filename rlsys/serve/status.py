"""What the operator sees: queue and throughput."""

from __future__ import annotations

import time
from collections import Counter
from datetime import datetime

from rlsys.serve.state import State


class StatusLine:
    """One line about the time since the last one; None while nothing happens."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._at = time.monotonic()
        self._counts = Counter(state.counts)
        self._shown = ""

    def text(self) -> str | None:
        state, at = self._state, time.monotonic()
        seconds, before = at - self._at, self._counts
        self._at, self._counts = at, Counter(state.counts)
        rates = {key: (self._counts[key] - before[key]) / seconds for key in ("train_tokens", "sampled_tokens")}
        steps, requests = (self._counts[key] - before[key] for key in ("steps", "sample_requests"))
        body = (
            f"sessions {sum(each.ended is None for each in state.sessions.values())}  models {len(state.models)}  "
            f"waiting calls {sum(model.queue.waiting for model in state.models.values())}  "
            f"samples in flight {state.samples_in_flight.total()}  "
            f"trained {rates['train_tokens']:,.0f} tokens/s  sampled {rates['sampled_tokens']:,.0f} tokens/s  "
            f"steps {steps}  sample requests {requests}  results {state.promises.nbytes / 2**20:.1f} MiB"
        )
        if body == self._shown:
            return None
        self._shown = body
        return f"{datetime.now():%H:%M:%S}  {body}"
