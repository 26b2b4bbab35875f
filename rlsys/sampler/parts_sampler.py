"""Completions of one prompt in parts, as the engine samples them."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

import numpy as np

from rlsys.answer_parts import AnswerParts, CompletionPart, PartsRequest
from rlsys.sampler.request_runner import RequestRunner
from rlsys.sampler.requests import (
    BaseModel,
    check_sequences,
    completion_part,
    parts_params,
    prompt_scores,
    score_params,
)


class PartsSampler:
    """Requests of one engine whose outputs are passed on while it samples."""

    def __init__(self, runner: RequestRunner, about: BaseModel, max_length: int) -> None:
        self._runner, self._about, self._max_length = runner, about, max_length

    async def answer(
        self, request: PartsRequest, seed: int, run_id: str | None, version: int
    ) -> AsyncGenerator[AnswerParts, None]:
        """Parts of `request.n` completions; the first has the prompt's scores. Closing the generator aborts the
        request in the engine.

        Raises:
            SamplingError: nothing was started.
        """
        room, prompt = request.params.max_tokens if request.n else 0, request.prompt
        offsets = np.array([0, len(prompt)], np.int64)
        check_sequences("prompt", [0], prompt, offsets, room, self._max_length, self._about.vocab_size)
        children = request.n if request.params.temperature > 0 else min(request.n, 1)
        # Several completions share their prompt's cached prefix, which a request that scores cannot use.
        scored_apart = request.prompt_topk is not None and children != 1
        topk = request.prompt_topk or 0
        with self._runner.using(run_id, version, max(children, 1)) as adapter:
            row = prompt.tolist()
            if scored_apart:
                (output,) = await self._runner.run([self._runner.generate(row, score_params(topk), adapter)], adapter)
                yield AnswerParts((), prompt_scores(output, topk))
            if not children:
                return
            params = parts_params(request, children, seed, self._about, scored=not scored_apart)
            wants_scores = request.prompt_topk is not None and not scored_apart
            async with aclosing(self._runner.outputs(row, params, adapter)) as outputs:
                async for output in outputs:
                    parts = [completion_part(each, request.topk) for each in output.outputs]
                    scores = prompt_scores(output, topk) if wants_scores else None
                    wants_scores = False
                    yield AnswerParts(_copies(parts, request.n // children), scores)


def _copies(parts: list[CompletionPart], count: int) -> tuple[CompletionPart, ...]:
    """A greedy completion is sampled once and counts `count` times."""
    if count == 1:
        return tuple(parts)
    return tuple(replace(part, index=index) for part in parts for index in range(count))
