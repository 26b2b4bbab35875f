"""From a question to the tokens that the model reads, and from messages to those that it is taught.

Where the tokenizer has a chat template, that template writes all that stands around the texts; what stands between two
turns of a conversation is read off it. A conversation only ever grows: what the model wrote stays as it wrote it, even
where the template would write the history anew (Qwen3's leaves earlier thinking out).

Texts from data are protected first (rlsys/tokenization/control_tokens.py): what they spell, they never become.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlsys.config import PromptSection
from rlsys.data.messages import Messages
from rlsys.errors import ConfigError
from rlsys.tokenization.chat_template import Message, applied, inner_turn_end, last_turn_end, leading_special, unclear
from rlsys.tokenization.control_tokens import ControlTokens, control_tokens
from rlsys.tokenization.stop_conditions import text_end
from rlsys.types import Array

BETWEEN_EXAMPLES = "\n\n"  # few-shot examples without a chat template
QUESTION, TURN = "the-question", "the-turn"  # stand for texts of a conversation where the template is looked at


@dataclass(frozen=True, slots=True)
class _Seam:
    """How a template ends the model's turns in a conversation that goes on."""

    end: str  # of the model's turn: the token that it may have written itself; "" where there is none
    closes: bool  # the template ends a last turn too, so that any end token has ended one


class Renderer:
    """How a job's prompts are written for one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, section: PromptSection) -> None:
        has_template = bool(tokenizer.chat_template)
        self.chat = has_template if section.chat is None else section.chat
        if self.chat and not has_template:
            raise ConfigError("prompt.chat: the model's tokenizer has no chat template; set prompt.chat=false")
        if section.system is not None and not self.chat:
            raise ConfigError(
                "prompt.system: the model's tokenizer has no chat template to put it into; put it into prompt.template"
            )
        self._tokenizer, self._section = tokenizer, section
        self._controls = control_tokens(tokenizer)

    def render(self, question: str | Messages) -> str:
        """The prompt as a person reads it."""
        return self._controls.readable(self._written(question))

    def ids(self, question: str | Messages) -> list[int]:
        """The prompt as tokens. Control tokens are those of the chat template, or of prompt.template without one.

        Messages are written as messages: system first, then few-shot examples, then what was said. prompt.template
        stands around the last of them.

        Raises:
            ConfigError: messages without a chat template, or with a system prompt beside the job's.
        """
        text = self._written(question)
        return self._controls.ids(text) if self.chat else _begun(self._tokenizer, self._controls, text)

    def reply_ids(self, reply: str, last: int | None, ended: bool) -> list[int]:
        """The tokens between the model's last turn and its next.

        `last`: the turn's last token, None of an empty turn; `ended`: it is one that ends a completion. Without a chat
        template they are the reply's, as it is. Whatever a reply says, it makes no special token.

        Raises:
            ConfigError: the chat template does not tell what stands there.
        """
        words = self._controls.protect(reply)
        if not self.chat:
            return self._controls.ids(words)
        # Written by the template, which may trim a reply, and encoded in one piece from the turn's end on.
        seam = self._seam
        ids = self._controls.ids(self._cut(self._prompt(self._asked(TURN, words)), [QUESTION, TURN])[-1])
        end = self._controls.ids(seam.end)
        if not end or not ((ended and seam.closes) or last == end[-1]):
            return ids
        return ids[ids.index(end[-1]) + 1 :]

    def _written(self, question: str | Messages) -> str:
        """The prompt as text, with marks."""
        if not isinstance(question, str):
            return self._conversation(question)
        asked = self._question(question)
        if self.chat:
            return self._prompt([*self._opening, {"role": "user", "content": asked}])
        shown = [
            self._question(example.prompt) + self._controls.protect(example.answer)
            for example in self._section.few_shot
        ]
        return BETWEEN_EXAMPLES.join([*shown, asked])

    def _conversation(self, messages: Messages) -> str:
        if not self.chat:
            raise ConfigError(
                "prompt.chat: without a chat template there is no way to write messages of "
                f"{', '.join(role for role, _ in messages)}; wanted one message of the user's, or a model with a "
                "chat template"
            )
        protect = self._controls.protect
        *before, (last, asked) = messages
        spoken = [{"role": role, "content": protect(content)} for role, content in before]
        opening = self._opening
        if spoken and spoken[0]["role"] == "system":
            if self._section.system is not None:
                raise ConfigError(
                    "prompt.system: the messages begin with a system prompt already; leave prompt.system out, or the "
                    "system messages out of the data"
                )
            opening = [spoken.pop(0), *opening]
        return self._prompt([*opening, *spoken, {"role": last, "content": self._question(asked)}])

    def _question(self, question: str) -> str:
        """In a chat all of it is one message's text; else the template is the only place for control tokens."""
        template, protect = self._section.template, self._controls.protect
        if self.chat:
            return protect(template.replace("{prompt}", question))
        return template.replace("{prompt}", protect(question))

    @property
    def _opening(self) -> list[Message]:
        """All messages before the question."""
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
        return applied(self._tokenizer, messages, True, self._section.template_options, self._section.date)

    @cached_property
    def _seam(self) -> _Seam:
        """Read off two conversations, of one reply and of two, and checked against each other and the prompt.

        opening Q after, first-turn end before first-reply after, second-turn end before second-reply after
        """
        said = (TURN, "first-reply", "second-turn", "second-reply")
        opening, after = self._cut(self._prompt(self._asked()), [QUESTION])
        first = self._cut(self._prompt(self._asked(*said[:2])), [QUESTION, *said[:2]])
        second = self._cut(self._prompt(self._asked(*said)), [QUESTION, *said])
        if not (opening == first[0] == second[0]):
            raise unclear(self._tokenizer, "what it writes before the question changes once there are more turns")
        if not (first[2] == second[2] == second[4]) or not (after == first[3] == second[5]):
            raise unclear(self._tokenizer, "what it writes around a reply changes from one reply to the next")
        end = leading_special(self._tokenizer, first[2])
        closes = bool(last_turn_end(self._tokenizer, self._section.template_options))
        return _Seam(end, closes)

    def _asked(self, *said: str) -> list[Message]:
        """A conversation of which only what is said by turns is known."""
        spoken = zip(itertools.cycle(("user", "assistant")), (QUESTION, *said), strict=False)
        return [*self._opening, *({"role": role, "content": text} for role, text in spoken)]

    def _cut(self, text: str, said: Sequence[str]) -> list[str]:
        """What stands before, between and after the texts, which are expected in their order."""
        pieces = []
        for mark in said:
            piece, found, text = text.partition(mark)
            if not found:
                raise unclear(self._tokenizer, "it does not write every turn and reply as it is given")
            pieces.append(piece)
        return [*pieces, text]


def build_supervised_example(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    template_options: Mapping[str, Any] | None = None,
    date: str | None = None,
) -> tuple[Array, Array]:
    """A conversation's (T,) int32 tokens and (T,) float32 weights: 1 on what the assistant says and the token that ends
    it, else 0.

    Each part is encoded by itself, so that the assistant's begins just where sampling would begin. Without a chat
    template the texts lie end to end and the assistant's end in the end token. `date`: the day (ISO 8601) for templates
    that write today's.

    Raises:
        ConfigError: no message is the assistant's, one holds something other than texts or has a control token as its
            role, or the template does not tell which part of the text is the assistant's.
    """
    if not any(message["role"] == "assistant" for message in messages):
        raise ConfigError(
            f"messages: found roles {[message['role'] for message in messages]}; wanted at least one 'assistant'"
        )
    controls = control_tokens(tokenizer)
    said = [_protected(message, at, controls) for at, message in enumerate(messages)]
    if tokenizer.chat_template:
        parts = [
            (controls.ids(text), taught)
            for text, taught in _taught_parts(tokenizer, said, template_options or {}, date)
        ]
    else:
        parts = [(_begun(tokenizer, controls, ""), False)]
        for message in said:
            taught = message["role"] == "assistant"
            ends = [text_end(tokenizer)] if taught else []
            parts.append(([*controls.ids(message["content"]), *ends], taught))
    tokens = [np.array(ids, np.int32) for ids, _ in parts]
    weights = [np.full(len(ids), taught, np.float32) for ids, taught in parts]
    return np.concatenate(tokens), np.concatenate(weights)


def _protected(message: Message, at: int, controls: ControlTokens) -> Message:
    for key, text in message.items():
        if not isinstance(text, str):
            raise ConfigError(
                f"messages: message {at}: {key} is {type(text).__name__} {str(text)[:80]!r}; wanted a text"
            )
    role = message["role"]  # which templates write as it is, and compare with those that they know
    if controls.protect(role) != role:
        raise ConfigError(
            f"messages: message {at}: the role {role[:80]!r} spells a control token; wanted a role that the chat "
            "template knows, such as user"
        )
    return {key: text if key == "role" else controls.protect(text) for key, text in message.items()}


def _taught_parts(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], options: Mapping[str, Any], date: str | None
) -> list[tuple[str, bool]]:
    """The rendered conversation cut into parts, end to end, and whether each is the assistant's."""
    whole = applied(tokenizer, messages, False, options, date)
    last = last_turn_end(tokenizer, options)
    if not last:
        raise unclear(tokenizer, "it ends the assistant's message in no special token")
    ends = {last, inner_turn_end(tokenizer, options)} - {""}
    parts, at = [], 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = applied(tokenizer, messages[:i], True, options, date)
        stop = _turn_stop(whole, len(prompt), {last} if i == len(messages) - 1 else ends, i == len(messages) - 1)
        if not whole.startswith(prompt) or stop is None:
            raise unclear(
                tokenizer,
                f"what it writes before message {i} to prompt the assistant is not what it writes when the message is "
                "there; give each assistant message an example of its own, or other template options",
            )
        parts += [(whole[at : len(prompt)], False), (whole[len(prompt) : stop], True)]
        at = stop
    return [*parts, (whole[at:], False)]


def _turn_stop(whole: str, start: int, ends: set[str], is_last: bool) -> int | None:
    """Where the turn from `start` on is over, its end included.

    Texts are protected, so the first end token is the turn's. The last turn may hold others before its end: gpt-oss
    ends its thinking as it ends a turn of the history.
    """
    if is_last:
        (end,) = ends
        found = whole.rfind(end, start)
        return None if found < 0 else found + len(end)
    stops = [(whole.find(end, start), len(end)) for end in ends]
    return min((at + length for at, length in stops if at >= 0), default=None)


def _begun(tokenizer: PreTrainedTokenizerBase, controls: ControlTokens, text: str) -> list[int]:
    """With the token that begins a text where the tokenizer puts one and the text does not; with none that ends it."""
    ids, begin = controls.ids(text), tokenizer.bos_token_id
    if begin is None or begin not in tokenizer.encode("")[:1] or ids[:1] == [begin]:
        return ids
    return [begin, *ids]
