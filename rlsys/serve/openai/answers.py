"""Answers of /v1: parts of completions as choices of one response, or as the chunks of a stream."""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from rlsys.answer_parts import CompletionPart, PromptScores
from rlsys.serve.openai.requests import ChatBody, CompletionBody, SampledBody
from rlsys.serve.openai.text import TextCodec, Token
from rlsys.types import Array

Json = dict[str, Any]  # Any: JSON
LOWEST = -9999.0  # stands for a log-probability of -infinity, which JSON lacks


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a request; its text, as far as it is asked for."""

    ids: list[int]
    text: str = ""


@dataclass(frozen=True, slots=True)
class _Scored:
    """A token with its log-probability, and the likeliest tokens in its place; None: the first of a prompt."""

    token: Token
    logprob: float | None
    top: list[tuple[Token, float]] | None


class Writer(Protocol):
    """JSON of one request's answers. Calls for one choice come in the order of its parts."""

    def choice(self, prompt: int, part: CompletionPart) -> Json:
        """A choice of a response, from the part that holds the complete completion."""

    def chunk(self, prompt: int, part: CompletionPart) -> Json | None:
        """A choice of a stream's next event; None: there is nothing to say yet."""

    def response(self, choices: Sequence[Json]) -> Json: ...
    def event(self, choices: Sequence[Json]) -> Json: ...


class _Base:
    """What both kinds of answer share."""

    def __init__(self, body: SampledBody, codec: TextCodec, prompts: Sequence[Prompt], kind: str, prefix: str) -> None:
        self._codec, self._prompts, self._kind = codec, prompts, kind
        self._n, self._model, self._gives_ids = body.n, body.model, body.return_token_ids
        self._gives_usage = body.includes_usage
        self._id, self._created = f"{prefix}-{uuid.uuid4().hex}", int(time.time())
        self.completion_tokens = 0
        self.scores: dict[int, PromptScores] = {}  # by index of the prompt

    def response(self, choices: Sequence[Json]) -> Json:
        ordered = sorted(choices, key=lambda choice: choice["index"])
        return {**self._head(self._kind), "choices": ordered, "usage": self._usage()}

    def event(self, choices: Sequence[Json]) -> Json:
        """The JSON of an event; without a choice, the one with the usage."""
        value = {**self._head(self._chunk_kind), "choices": list(choices)}
        if self._gives_usage:
            value["usage"] = None if choices else self._usage()
        return value

    @property
    def _chunk_kind(self) -> str:
        return self._kind

    def _head(self, kind: str) -> Json:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _usage(self) -> Json:
        prompt_tokens = sum(len(prompt.ids) for prompt in self._prompts)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": prompt_tokens + self.completion_tokens,
        }

    def _index(self, prompt: int, part: CompletionPart) -> int:
        return prompt * self._n + part.index

    def _ids(self, prompt: int, part: CompletionPart, with_prompt: bool) -> Json:
        if not self._gives_ids:
            return {}
        return {
            "token_ids": part.tokens.tolist(),
            "prompt_token_ids": self._prompts[prompt].ids if with_prompt else None,
        }

    def _scored(self, part: CompletionPart) -> list[_Scored]:
        rows = zip(part.tokens, part.logprobs, part.topk_tokens, part.topk_logprobs, strict=True)
        return [self._row(*row) for row in rows]

    def _scored_prompt(self, prompt: int) -> list[_Scored]:
        ids, scores = self._prompts[prompt].ids, self.scores[prompt]
        rows = zip(ids[1:], scores.logprobs[1:], scores.topk_tokens, scores.topk_logprobs, strict=True)
        return [_Scored(self._token(ids[0]), None, None), *(self._row(*row) for row in rows)]

    def _row(self, id_: int, logprob: float, top_ids: Array, top_logprobs: Array) -> _Scored:
        likeliest = zip(top_ids, top_logprobs, strict=True)
        top = [(self._token(each), _finite(value)) for each, value in likeliest]
        return _Scored(self._token(id_), _finite(logprob), top)

    def _token(self, id_: int) -> Token:
        return self._codec.token(int(id_))


class CompletionWriter(_Base):
    """Answers of /v1/completions."""

    def __init__(self, body: CompletionBody, codec: TextCodec, prompts: Sequence[Prompt]) -> None:
        super().__init__(body, codec, prompts, "text_completion", "cmpl")
        self._body = body
        self._begun: set[int] = set()
        self._offsets = Counter[int]()  # choice -> characters of its tokens so far

    def choice(self, prompt: int, part: CompletionPart) -> Json:
        index = self._index(prompt, part)
        is_first = index not in self._begun
        self._begun.add(index)
        self.completion_tokens += len(part.tokens)
        echoes = is_first and self._body.echo
        text = (self._prompts[prompt].text if echoes else "") + part.text
        logprobs = None
        if self._body.logprobs is not None:
            scored = [*(self._scored_prompt(prompt) if echoes else ()), *self._scored(part)]
            logprobs = self._table(index, scored)
        value = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": part.finish}
        return {**value, **self._ids(prompt, part, is_first)}

    def chunk(self, prompt: int, part: CompletionPart) -> Json | None:
        value = self.choice(prompt, part)
        says = value["text"] or value["finish_reason"] or (value["logprobs"] or {}).get("tokens")
        return value if says or value.get("token_ids") else None

    def _table(self, index: int, scored: Sequence[_Scored]) -> Json:
        """Columns over tokens. The likeliest tokens always include the one that is there."""
        offsets = list[int]()
        tops = list[dict[str, float] | None]()
        for each in scored:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(each.token.text)
            if each.top is None or each.logprob is None:
                tops.append(None)
            else:
                likeliest = {token.text: value for token, value in reversed(each.top)}
                tops.append({**likeliest, each.token.text: each.logprob})
        return {
            "text_offset": offsets,
            "token_logprobs": [each.logprob for each in scored],
            "tokens": [each.token.text for each in scored],
            "top_logprobs": tops,
        }


class ChatWriter(_Base):
    """Answers of /v1/chat/completions."""

    def __init__(self, body: ChatBody, codec: TextCodec, prompts: Sequence[Prompt]) -> None:
        super().__init__(body, codec, prompts, "chat.completion", "chatcmpl")
        self._logprobs = body.logprobs
        self._begun: set[int] = set()

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk"

    def choice(self, prompt: int, part: CompletionPart) -> Json:
        message = {"role": "assistant", "content": part.text}
        return {**self._rest(prompt, part, True), "message": message}

    def chunk(self, prompt: int, part: CompletionPart) -> Json | None:
        index = self._index(prompt, part)
        is_first = index not in self._begun
        self._begun.add(index)
        value = self._rest(prompt, part, is_first)
        says = part.text or part.finish or value["logprobs"] or value.get("token_ids")
        if not (says or is_first):
            return None
        role = {"role": "assistant"} if is_first else {}
        return {**value, "delta": {**role, "content": part.text}}

    def _rest(self, prompt: int, part: CompletionPart, is_first: bool) -> Json:
        self.completion_tokens += len(part.tokens)
        logprobs = (
            {"content": [_entry(each) for each in self._scored(part)], "refusal": None} if self._logprobs else None
        )
        value = {"index": self._index(prompt, part), "logprobs": logprobs, "finish_reason": part.finish}
        return {**value, **self._ids(prompt, part, is_first)}


def joined(parts: Sequence[CompletionPart]) -> CompletionPart:
    """Parts of one completion as one."""
    if len(parts) == 1:
        return parts[0]
    return CompletionPart(
        parts[0].index,
        "".join(part.text for part in parts),
        np.concatenate([part.tokens for part in parts]),
        np.concatenate([part.logprobs for part in parts]),
        np.concatenate([part.topk_tokens for part in parts]),
        np.concatenate([part.topk_logprobs for part in parts]),
        parts[-1].finish,
    )


def _entry(scored: _Scored) -> Json:
    assert scored.logprob is not None, "a sampled token has a log-probability"
    return {**_named(scored.token, scored.logprob), "top_logprobs": [_named(*each) for each in scored.top or ()]}


def _named(token: Token, logprob: float) -> Json:
    return {"token": token.text, "logprob": logprob, "bytes": list(token.data)}


def _finite(logprob: float) -> float:
    return max(float(logprob), LOWEST)
