"""Renders prompts, environment replies and supervised examples to token ids.

If the tokenizer has a chat template, it writes everything around the texts. The tokens between two turns of a
conversation are derived from the template's output. A conversation is append-only: tokens that the model sampled are
never rendered again, even if the template would change the history (Qwen3's template drops earlier thinking).

Texts from data are protected first (rlsys/tokenization/control_tokens.py): they cannot produce special tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from rlsys.config import PromptSection
from rlsys.data.messages import Messages
from rlsys.errors import ConfigError
from rlsys.tokenization.chat_template import (
    Message,
    apply_template,
    inner_turn_end,
    last_turn_end,
    leading_special,
    template_error,
)
from rlsys.tokenization.control_tokens import ControlTokens, control_tokens
from rlsys.tokenization.stop_conditions import eos_id
from rlsys.types import Array

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BETWEEN_EXAMPLES = "\n\n"  # separator of few-shot examples without a chat template
QUESTION, TURN = "the-question", "the-turn"  # placeholder texts, to find what the template writes around them


@dataclass(frozen=True, slots=True)
class _TurnEnd:
    """How the template ends the model's turns when more turns follow."""

    end: str  # the end token, which the model may have sampled itself; "" if the template has none
    closes: bool  # the template also ends a last turn, so that a turn with any end token has been ended


class Renderer:
    """Renders the prompts of a job for one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, section: PromptSection) -> None:
        has_template = bool(tokenizer.chat_template)
        self.chat = has_template if section.chat is None else section.chat
        if self.chat and not has_template:
            raise ConfigError("prompt.chat: the model's tokenizer has no chat template; set prompt.chat=false")
        if section.system is not None and not self.chat:
            raise ConfigError(
                "prompt.system: the model's tokenizer has no chat template, so there is no system message; add the "
                "text to prompt.template"
            )
        self._tokenizer, self._section = tokenizer, section
        self._controls = control_tokens(tokenizer)

    def render(self, question: str | Messages) -> str:
        """Return the prompt as text for display."""
        return self._controls.readable(self._marked_text(question))

    def ids(self, question: str | Messages) -> list[int]:
        """Return the prompt as token ids.

        Control tokens come only from the chat template, or from prompt.template without one. Messages are rendered in
        the order: system message, few-shot examples, other messages. prompt.template applies to the last message.

        Raises:
            ConfigError: messages without a chat template, or messages with a system message if the job has one too.
        """
        return self.ids_of_each([question])[0]

    def ids_of_each(self, questions: Sequence[str | Messages]) -> list[list[int]]:
        """Return the prompts as token ids, as `ids` does, with few calls of the tokenizer."""
        rows = self._controls.ids_of_each([self._marked_text(question) for question in questions])
        return rows if self.chat else [_with_bos(self._tokenizer, ids) for ids in rows]

    def reply_ids(self, reply: str, last: int | None, ended: bool) -> list[int]:
        """Return the token ids between the model's last turn and its next turn.

        `last`: last token of the turn, None if the turn is empty; `ended`: that token is a stop token. Without a chat
        template the result is the encoded reply. A reply cannot produce special tokens.

        Raises:
            ConfigError: these tokens cannot be derived from the chat template.
        """
        protected = self._controls.protect(reply)
        if not self.chat:
            return self._controls.ids(protected)
        # The template renders the reply and may trim it; everything after the turn is encoded in one piece.
        turn_end = self._turn_end
        ids = self._controls.ids(self._split(self._prompt(self._turns(TURN, protected)), [QUESTION, TURN])[-1])
        end = self._controls.ids(turn_end.end)
        if not end or not ((ended and turn_end.closes) or last == end[-1]):
            return ids
        return ids[ids.index(end[-1]) + 1 :]

    def _marked_text(self, question: str | Messages) -> str:
        """Return the prompt as text with marks."""
        if not isinstance(question, str):
            return self._conversation(question)
        content = self._question(question)
        if self.chat:
            return self._prompt([*self._opening, {"role": "user", "content": content}])
        examples = [
            self._question(example.prompt) + self._controls.protect(example.answer)
            for example in self._section.few_shot
        ]
        return BETWEEN_EXAMPLES.join([*examples, content])

    def _conversation(self, messages: Messages) -> str:
        if not self.chat:
            raise ConfigError(
                "prompt.chat: messages with the roles "
                f"{', '.join(role for role, _ in messages)} cannot be rendered without a chat template; wanted a "
                "single user message, or a model with a chat template"
            )
        protect = self._controls.protect
        *before, (last_role, last_content) = messages
        history = [{"role": role, "content": protect(content)} for role, content in before]
        opening = self._opening
        if history and history[0]["role"] == "system":
            if self._section.system is not None:
                raise ConfigError(
                    "prompt.system: the messages already have a system message; remove prompt.system, or the system "
                    "messages from the data"
                )
            opening = [history.pop(0), *opening]
        return self._prompt([*opening, *history, {"role": last_role, "content": self._question(last_content)}])

    def _question(self, question: str) -> str:
        """Insert the question into prompt.template, which may have control tokens only without a chat template."""
        template, protect = self._section.template, self._controls.protect
        if self.chat:
            return protect(template.replace("{prompt}", question))
        return template.replace("{prompt}", protect(question))

    @property
    def _opening(self) -> list[Message]:
        """Messages before the question: system message and few-shot examples."""
        section, protect = self._section, self._controls.protect
        system = [] if section.system is None else [{"role": "system", "content": protect(section.system)}]
        return [
            *system,
            *(
                message
                for example in section.few_shot
                for message in (
                    {"role": "user", "content": self._question(example.prompt)},
                    {"role": "assistant", "content": protect(example.answer)},
                )
            ),
        ]

    def _prompt(self, messages: Sequence[Message]) -> str:
        return apply_template(self._tokenizer, messages, True, self._section.template_options, self._section.date)

    @cached_property
    def _turn_end(self) -> _TurnEnd:
        """Derive the turn end from two rendered conversations, with one reply and with two.

        Both conversations and the prompt must have the same text around each turn and reply:

        opening Q after, first-turn end before first-reply after, second-turn end before second-reply after
        """
        texts = (TURN, "first-reply", "second-turn", "second-reply")
        opening, after = self._split(self._prompt(self._turns()), [QUESTION])
        first = self._split(self._prompt(self._turns(*texts[:2])), [QUESTION, *texts[:2]])
        second = self._split(self._prompt(self._turns(*texts)), [QUESTION, *texts])
        if not (opening == first[0] == second[0]):
            raise template_error(self._tokenizer, "its text before the question changes when more turns follow")
        if not (first[2] == second[2] == second[4]) or not (after == first[3] == second[5]):
            raise template_error(self._tokenizer, "its text around a reply differs between replies")
        end = leading_special(self._tokenizer, first[2])
        closes = bool(last_turn_end(self._tokenizer, self._section.template_options))
        return _TurnEnd(end, closes)

    def _turns(self, *texts: str) -> list[Message]:
        """Return a conversation: the opening, the placeholder question, then `texts` as alternating turns."""
        turns = zip(itertools.cycle(("user", "assistant")), (QUESTION, *texts), strict=False)
        return [*self._opening, *({"role": role, "content": text} for role, text in turns)]

    def _split(self, rendered: str, texts: Sequence[str]) -> list[str]:
        """Return the parts of the rendered conversation before, between and after `texts`, in this order."""
        parts = []
        for text in texts:
            part, separator, rendered = rendered.partition(text)
            if not separator:
                raise template_error(self._tokenizer, "it does not write every turn and reply unchanged")
            parts.append(part)
        return [*parts, rendered]


def build_supervised_example(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    template_options: Mapping[str, object] | None = None,
    date: str | None = None,
) -> tuple[Array, Array]:
    """Encode a conversation as (T,) int32 tokens and (T,) float32 loss weights.

    The weight is 1 for the assistant's messages and the tokens that end them, else 0. Each part is encoded separately,
    so that the assistant's tokens start exactly where sampling would start. Without a chat template the texts are
    concatenated, and each assistant message ends with the EOS token. `date`: day (ISO 8601) for templates that write
    the current date.

    Raises:
        ConfigError: there is no assistant message, a message has a value that is not a string or a control token in its
            role, or the assistant's part cannot be derived from the template.
    """
    if not any(message["role"] == "assistant" for message in messages):
        raise ConfigError(
            f"messages: found roles {[message['role'] for message in messages]}; wanted at least one 'assistant'"
        )
    controls = control_tokens(tokenizer)
    protected = [_protected(message, i, controls) for i, message in enumerate(messages)]
    if tokenizer.chat_template:
        parts = [
            (controls.ids(text), is_assistant)
            for text, is_assistant in _assistant_parts(tokenizer, protected, template_options or {}, date)
        ]
    else:
        parts = [(_with_bos(tokenizer, controls.ids("")), False)]
        for message in protected:
            is_assistant = message["role"] == "assistant"
            ends = [eos_id(tokenizer)] if is_assistant else []
            parts.append(([*controls.ids(message["content"]), *ends], is_assistant))
    tokens = [np.array(ids, np.int32) for ids, _ in parts]
    weights = [np.full(len(ids), is_assistant, np.float32) for ids, is_assistant in parts]
    return np.concatenate(tokens), np.concatenate(weights)


def _protected(message: Message, index: int, controls: ControlTokens) -> Message:
    for key, text in message.items():
        if not isinstance(text, str):
            raise ConfigError(
                f"messages: message {index}: {key} is {type(text).__name__} {str(text)[:80]!r}; wanted a string"
            )
    role = message["role"]  # not protected: templates compare it with the roles that they know
    if controls.protect(role) != role:
        raise ConfigError(
            f"messages: message {index}: the role {role[:80]!r} contains a control token; wanted a role that the chat "
            "template knows, such as user"
        )
    return {key: text if key == "role" else controls.protect(text) for key, text in message.items()}


def _assistant_parts(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], options: Mapping[str, object], date: str | None
) -> list[tuple[str, bool]]:
    """Split the rendered conversation into consecutive parts: (text, whether the text is the assistant's)."""
    rendered = apply_template(tokenizer, messages, False, options, date)
    last_end = last_turn_end(tokenizer, options)
    if not last_end:
        raise template_error(tokenizer, "it ends the assistant's message without a special token")
    ends = {last_end, inner_turn_end(tokenizer, options)} - {""}
    parts, start = [], 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        is_last = i == len(messages) - 1
        prompt = apply_template(tokenizer, messages[:i], True, options, date)
        stop = _turn_stop(rendered, len(prompt), {last_end} if is_last else ends, is_last)
        if not rendered.startswith(prompt) or stop is None:
            raise template_error(
                tokenizer,
                f"the prompt that it writes for message {i} differs from the text before message {i} in the full "
                "conversation; split the conversation into one example per assistant message, or change the template "
                "options",
            )
        parts += [(rendered[start : len(prompt)], False), (rendered[len(prompt) : stop], True)]
        start = stop
    return [*parts, (rendered[start:], False)]


def _turn_stop(rendered: str, start: int, ends: set[str], is_last: bool) -> int | None:
    """Return the position after the end token of the turn that starts at `start`; None if the turn has no end.

    Texts are protected, so the first end token is that of the turn. The last turn may contain other end tokens before
    its own: gpt-oss ends its thinking with the token that ends earlier turns.
    """
    if is_last:
        (end,) = ends
        position = rendered.rfind(end, start)
        return None if position < 0 else position + len(end)
    positions = [(rendered.find(end, start), len(end)) for end in ends]
    return min((position + length for position, length in positions if position >= 0), default=None)


def _with_bos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Return the ids after the BOS token if the tokenizer adds one and they do not have it; never with EOS."""
    bos = tokenizer.bos_token_id
    if bos is None or ids[:1] == [bos] or bos not in tokenizer.encode("")[:1]:
        return ids
    return [bos, *ids]
