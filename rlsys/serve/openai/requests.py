"""Bodies of /v1 requests: what is served, and what is refused by name.

vLLM's own models of these bodies import torch (12.8 s and 530 MiB in the HTTP process), so the fields stand here;
tests/unit/serve/openai/test_vllm_fields.py compares their names with vLLM's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from rlsys.serve.errors import Refusal
from rlsys.serve.openai.errors import DoorRefusal
from rlsys.serve.wire.json_body import WireModel, as_model, is_text, load

Neutral = Mapping[str, tuple[object, ...]]  # parameter that is not served -> values that ask for nothing
Body = TypeVar("Body", bound="SampledBody")
MAX_INT = 2**63 - 1
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")  # what may be half of a character

UNSERVED: Neutral = {
    "allowed_token_ids": (),
    "bad_words": ([],),
    "cache_salt": (),
    "ec_transfer_params": (),
    "frequency_penalty": (0,),
    "include_stop_str_in_output": (False,),
    "kv_transfer_params": (),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "logprob_token_ids": (),
    "metadata": ({},),
    "min_p": (0,),
    "min_tokens": (0,),
    "mm_payload": ("tensors",),
    "presence_penalty": (0,),
    "priority": (0,),
    "prompt_logprobs": (),
    "repetition_detection": (),
    "repetition_penalty": (1,),
    "request_id": (),
    "response_format": ({"type": "text"},),
    "return_mm_kwargs": (),
    "return_token_offsets": (False,),
    "return_tokens_as_token_ids": (False,),
    "routed_experts_prompt_start": (0,),
    "service_tier": ("auto", "default"),
    "session_id": (),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "store": (False,),
    "stream_interval": (),
    "structured_outputs": (),
    "thinking_token_budget": (),
    "truncate_prompt_tokens": (),
    "truncation_side": (),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    "watermarking": (),
}


class StreamOptions(WireModel):
    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class SampledBody(WireModel):
    """What both kinds of request have."""

    UNSERVED: ClassVar[Neutral] = UNSERVED

    model: str
    temperature: float = Field(1.0, ge=0.0, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    top_k: int = Field(-1, ge=-1)  # -1 and 0: all
    n: int = Field(1, ge=1)
    seed: int | None = Field(None, ge=-MAX_INT - 1, le=MAX_INT)
    stop: str | list[str] = Field(default_factory=list)
    stop_token_ids: list[int] = Field(default_factory=list)
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    # For the caller's own accounting. They change no answer.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionBody(SampledBody):
    """Body of POST /v1/completions."""

    UNSERVED: ClassVar[Neutral] = {**UNSERVED, "prompt_embeds": (), "suffix": ("",)}

    prompt: str | list[int] | list[str] | list[list[int]]
    best_of: int | None = None
    max_tokens: int = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0)
    echo: bool = False
    add_special_tokens: bool = True


class TextPart(WireModel):
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)


class ChatBody(SampledBody):
    """Body of POST /v1/chat/completions."""

    UNSERVED: ClassVar[Neutral] = {
        **UNSERVED,
        "add_generation_prompt": (True,),
        "add_special_tokens": (False,),
        "audio": (),
        "chat_template": (),
        "continue_final_message": (False,),
        "documents": ([],),
        "echo": (False,),
        "function_call": ("none",),
        "functions": ([],),
        "media_io_kwargs": ({},),
        "mm_processor_kwargs": ({},),
        "modalities": (["text"],),
        "parallel_tool_calls": (True, False),
        "prediction": (),
        "include_reasoning": (True,),
        "reasoning_effort": (),
        "return_prompt_text": (False,),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "verbosity": (),
        "web_search_options": (),
    }

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0)
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)  # Any: values of the model's own template


def read_body(kind: type[Body], body: bytes) -> Body:
    """
    Raises:
        DoorRefusal: 400, with the parameter at fault.
    """
    try:
        value = load(body)
        if isinstance(value, dict):
            if _HALF.search(body):
                _refuse_half_characters(value)
            value = _served(kind, value)
        return as_model(kind, value)
    except DoorRefusal:
        raise
    except Refusal as refusal:
        where = refusal.detail.partition(":")[0].partition(".")[0]
        raise DoorRefusal(refusal.detail, where if where in kind.model_fields else None) from None


def _served(kind: type[Body], value: dict[str, Any]) -> dict[str, Any]:
    """The parameters that are served. Others may only have the value that asks for nothing."""
    kept = {}
    for name, given in value.items():
        if name in kind.model_fields:
            kept[name] = given
        elif name not in kind.UNSERVED:
            raise DoorRefusal(f"{name[:100]}: no parameter of this call", name[:100], code="unknown_parameter")
        elif given is not None and given not in kind.UNSERVED[name]:
            neutral = " or ".join(repr(each) for each in kind.UNSERVED[name]) or "null"
            raise DoorRefusal(f"{name}: is not served; wanted {neutral}, or to leave it out", name)
    for message in kept.get("messages") or ():
        _refuse_parts(message)
    return kept


def _refuse_half_characters(value: Mapping[str, Any]) -> None:
    for name, given in value.items():
        if not is_text(json.dumps([name, given], ensure_ascii=False)):
            raise DoorRefusal(
                f"{name[:100]!r}: found half of a character (a lone surrogate); wanted text that UTF-8 can hold",
                name if is_text(name) else None,
            )


def _refuse_parts(message: object) -> None:
    """Refuse what a message of OpenAI's may hold beside text, by its name."""
    if not isinstance(message, dict):
        return  # the model says what is wrong
    if message.get("role") in ("tool", "function"):
        raise DoorRefusal(f"messages: found the role {message['role']!r}; tools are not served", "messages")
    extra = [name for name, given in message.items() if name not in ("role", "content") and given not in (None, [])]
    if extra:
        raise DoorRefusal(f"messages: found {extra[0][:60]!r}; messages here have role and content", "messages")
    parts = message.get("content")
    for part in parts if isinstance(parts, list) else ():
        if isinstance(part, dict) and part.get("type") != "text":
            raise DoorRefusal(
                f"messages: found a part of type {str(part.get('type'))[:40]!r}; models here read text", "messages"
            )
