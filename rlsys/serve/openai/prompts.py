"""Bodies of /v1 requests to what the engine is asked."""

from __future__ import annotations

import numpy as np

from rlsys.answer_parts import PartsRequest
from rlsys.errors import SamplingError
from rlsys.serve.backend import Base
from rlsys.serve.config import Limits
from rlsys.serve.openai.answers import Prompt
from rlsys.serve.openai.errors import DoorRefusal
from rlsys.serve.openai.requests import ChatBody, CompletionBody, SampledBody
from rlsys.serve.openai.text import TextCodec
from rlsys.serve.sampling import LOWEST_TEMPERATURE
from rlsys.types import SamplingParams


def completion_prompts(body: CompletionBody, codec: TextCodec) -> list[Prompt]:
    """The prompts of a body, encoded; with text if they are echoed. Takes as long as the tokenizer."""
    given = body.prompt
    if isinstance(given, str):
        texts, rows = [given], codec.encode([given], body.add_special_tokens)
    elif all(isinstance(each, str) for each in given):
        texts = [each for each in given if isinstance(each, str)]
        rows = codec.encode(texts, body.add_special_tokens)
    else:
        rows = [[each for each in given if isinstance(each, int)]] if isinstance(given[0], int) else []
        rows = rows or [each for each in given if isinstance(each, list)]
        texts = [codec.decode(row) for row in rows] if body.echo else [""] * len(rows)
    if not rows:
        raise DoorRefusal("prompt: found none; wanted text, or token ids", "prompt")
    return [Prompt(row, text) for row, text in zip(rows, texts, strict=True)]


def chat_prompts(body: ChatBody, codec: TextCodec) -> list[Prompt]:
    messages = [{"role": each.role, "content": each.text} for each in body.messages]
    return [Prompt(codec.chat(messages, body.chat_template_kwargs))]


def completion_requests(body: CompletionBody, prompts: list[Prompt], base: Base, limits: Limits) -> list[PartsRequest]:
    """
    Raises:
        DoorRefusal: 400, with the parameter at fault.
    """
    if body.best_of not in (None, body.n):
        raise DoorRefusal(f"best_of: found {body.best_of}; wanted n = {body.n}: all samples are returned", "best_of")
    if not (body.max_tokens or body.echo):
        raise DoorRefusal("max_tokens: found 0 without echo; wanted at least 1", "max_tokens")
    topk = body.logprobs or 0
    _refuse_above("logprobs", topk, limits.topk_prompt_logprobs, "limits.topk_prompt_logprobs")
    scores_prompt = body.echo and (body.logprobs is not None or not body.max_tokens)
    return _requests(body, body.max_tokens, topk, topk if scores_prompt else None, prompts, base, limits)


def chat_requests(body: ChatBody, prompts: list[Prompt], base: Base, limits: Limits) -> list[PartsRequest]:
    """As `completion_requests`."""
    if body.top_logprobs and not body.logprobs:
        raise DoorRefusal("top_logprobs: found it without logprobs; wanted logprobs: true", "top_logprobs")
    _refuse_above("top_logprobs", body.top_logprobs, limits.topk_prompt_logprobs, "limits.topk_prompt_logprobs")
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise DoorRefusal(
            f"max_tokens: found {body.max_tokens}, and max_completion_tokens {body.max_completion_tokens}; wanted one",
            "max_tokens",
        )
    max_tokens = body.max_tokens if body.max_tokens is not None else body.max_completion_tokens
    return _requests(body, max_tokens, body.top_logprobs, None, prompts, base, limits)


def _requests(
    body: SampledBody,
    max_tokens: int | None,
    topk: int,
    prompt_topk: int | None,
    prompts: list[Prompt],
    base: Base,
    limits: Limits,
) -> list[PartsRequest]:
    """`max_tokens` None: to the end of the context; 0: score the prompts only."""
    _refuse_above("n", body.n, limits.num_samples, "limits.num_samples")
    samples = body.n * len(prompts)
    _refuse_above("prompt: samples of all prompts", samples, limits.samples_in_flight, "limits.samples_in_flight")
    vocab_size, max_length = base.about.vocab_size, base.about.max_length
    _check_stops(body, vocab_size, limits)
    found = []
    for prompt in prompts:
        _check_ids("prompt", prompt.ids, vocab_size)
        room = max_length - len(prompt.ids)
        if room < (0 if max_tokens == 0 else 1) or not prompt.ids:
            raise DoorRefusal(
                f"prompt: found {len(prompt.ids)} tokens; wanted 1 to {max_length - (max_tokens != 0)}: the context "
                f"has {max_length}",
                "prompt" if isinstance(body, CompletionBody) else "messages",
                code="context_length_exceeded" if prompt.ids else None,
            )
        params = _params(body, max(room if max_tokens is None else min(max_tokens, room), 1), vocab_size)
        found.append(
            PartsRequest(
                prompt=np.array(prompt.ids, np.int32),
                n=0 if max_tokens == 0 else body.n,
                params=params,
                also_stop=tuple(body.stops),
                also_stop_ids=tuple(body.stop_token_ids),
                topk=topk,
                prompt_topk=prompt_topk,
                incremental=body.stream,
            )
        )
    return found


def _params(body: SampledBody, max_tokens: int, vocab_size: int) -> SamplingParams:
    try:
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=body.temperature and max(body.temperature, LOWEST_TEMPERATURE),
            top_p=body.top_p,
            top_k=-1 if body.top_k == 0 or body.top_k >= vocab_size else body.top_k,
            seed=body.seed,
            stop=[] if body.ignore_eos else None,
        )
    except SamplingError as error:
        raise DoorRefusal(str(error).removeprefix("SamplingParams.")) from None


def _check_stops(body: SampledBody, vocab_size: int, limits: Limits) -> None:
    _refuse_above("stop", len(body.stops) + len(body.stop_token_ids), limits.stop_strings, "limits.stop_strings")
    for stop in body.stops:
        if not 1 <= len(stop) <= limits.stop_string_chars:
            raise DoorRefusal(
                f"stop: found a string of {len(stop)} characters; wanted 1 to limits.stop_string_chars = "
                f"{limits.stop_string_chars}",
                "stop",
            )
    _check_ids("stop_token_ids", body.stop_token_ids, vocab_size)


def _check_ids(param: str, ids: list[int], vocab_size: int) -> None:
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        raise DoorRefusal(f"{param}: found ids from {min(ids)} to {max(ids)}; wanted 0 to {vocab_size - 1}", param)


def _refuse_above(what: str, found: int, most: int, limit: str) -> None:
    if found > most:
        raise DoorRefusal(f"{what}: found {found}; wanted at most {limit} = {most}", what.partition(":")[0])
