"""Applies a tokenizer's chat template, and finds the token with which it ends a turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from rlsys.errors import ConfigError
from rlsys.tokenization.control_tokens import special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]  # keys: role (system, user or assistant) and content


def apply_template(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    prompting: bool,
    options: Mapping[str, object],
    date: str | None = None,
) -> str:
    """Render messages with the chat template.

    `prompting`: append the start of the assistant's next message (add_generation_prompt). `date`: the day (ISO 8601)
    that ``strftime_now`` in a template returns; None: today.

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
    except Exception as error:  # a template is a program, which may raise any type
        roles = ", ".join(message["role"] for message in messages)
        raise template_error(tokenizer, f"it fails for messages with the roles {roles}: {error}") from error


def template_error(tokenizer: PreTrainedTokenizerBase, why: str) -> ConfigError:
    """Return the error for a chat template that cannot be used."""
    name = tokenizer.name_or_path or "the model"
    return ConfigError(
        f"prompt.chat: the chat template of {name} cannot be used: {why}; use a model with another template, or set "
        "prompt.chat=false and prompt.template"
    )


def leading_special(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Return the special token at the start of `text`, with the white space before it; "" without one."""
    blank = len(text) - len(text.lstrip())
    specials = [str(token) for token in special_tokens(tokenizer).values()]
    matches = [token for token in specials if token and text.startswith(token, blank)]
    return text[:blank] + max(matches, key=len) if matches else ""


def last_turn_end(tokenizer: PreTrainedTokenizerBase, options: Mapping[str, object]) -> str:
    """Return the special token that ends the assistant's message at the end of a conversation; "" without one.

    gpt-oss ends the last message with ``<|return|>``, and earlier messages with ``<|end|>``, which may also occur
    within an answer.
    """
    answer = "the-answer"
    messages = [{"role": "user", "content": "the-question"}, {"role": "assistant", "content": answer}]
    return leading_special(tokenizer, apply_template(tokenizer, messages, False, options).rpartition(answer)[2])


def inner_turn_end(tokenizer: PreTrainedTokenizerBase, options: Mapping[str, object]) -> str:
    """Return the special token that ends an assistant's message before a user's message; "" without one."""
    answer, reply = "the-answer", "the-reply"
    messages = [
        {"role": "user", "content": "the-question"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": reply},
    ]
    return leading_special(tokenizer, apply_template(tokenizer, messages, False, options).rpartition(answer)[2])
