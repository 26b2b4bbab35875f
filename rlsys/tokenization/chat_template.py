"""What a tokenizer's chat template writes, as text, and where in it a turn ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlsys.errors import ConfigError
from rlsys.tokenization.control_tokens import special_tokens

Message = Mapping[str, str]  # role: system, user or assistant; content


def applied(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    prompting: bool,
    options: Mapping[str, Any],
    date: str | None = None,
) -> str:
    """The messages as the template writes them. `prompting`: what begins the assistant's next message comes last.

    `date` is the day (ISO 8601) that a template is told where it asks for today's with ``strftime_now``; None: today's.

    Raises:
        ConfigError: the template fails on these messages.
    """
    if date is not None:
        options = {"strftime_now": datetime.fromisoformat(date).strftime, **options}
    try:
        return str(
            tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=prompting, **options
            )
        )
    except Exception as error:  # a template is a program of its own, and raises what it likes
        roles = ", ".join(message["role"] for message in messages)
        raise unclear(tokenizer, f"given messages of {roles} it fails: {error}") from error


def unclear(tokenizer: PreTrainedTokenizerBase, why: str) -> ConfigError:
    name = tokenizer.name_or_path or "the model"
    return ConfigError(
        f"prompt.chat: the chat template of {name} does not serve here: {why}; use a model with another template, or "
        "prompt.chat=false and prompt.template"
    )


def leading_special(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The special token that `text` begins with, white space before it included; "" where it begins with none."""
    blank = len(text) - len(text.lstrip())
    specials = [str(token) for token in special_tokens(tokenizer).values()]
    found = [token for token in specials if token and text.startswith(token, blank)]
    return text[:blank] + max(found, key=len) if found else ""


def last_turn_end(tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> str:
    """What ends the assistant's message where nothing follows; "" where no special token does.

    gpt-oss ends its last message in another token (``<|return|>``) than those of the history (``<|end|>``), and writes
    the latter within one answer too.
    """
    said = "the-answer"
    messages = [{"role": "user", "content": "the-question"}, {"role": "assistant", "content": said}]
    return leading_special(tokenizer, applied(tokenizer, messages, False, options).rpartition(said)[2])


def inner_turn_end(tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> str:
    """What ends the assistant's message where the user's next one follows; "" where no special token does."""
    said, reply = "the-answer", "the-reply"
    messages = [
        {"role": "user", "content": "the-question"},
        {"role": "assistant", "content": said},
        {"role": "user", "content": reply},
    ]
    return leading_special(tokenizer, applied(tokenizer, messages, False, options).rpartition(said)[2])
