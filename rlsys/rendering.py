"""From a question to the tokens that the model reads, and from messages to those that it is taught.

Where the tokenizer has a chat template, that template writes all that stands around the texts; what stands between two
turns of a conversation is read off it. A conversation only ever grows: what the model wrote stays as it wrote it, even
where the template would write the history anew (Qwen3's leaves earlier thinking out).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlsys.config import PromptSection
from rlsys.errors import ConfigError
from rlsys.types import Array

Message = Mapping[str, str]  # role: system, user or assistant; content

BETWEEN_EXAMPLES = "\n\n"  # few-shot examples without a chat template


@dataclass(frozen=True, slots=True)
class _Seam:
    """What a template writes between the model's turn and the reply, and between that and the model's next turn."""

    end: str  # of the model's turn: the token that it may have written itself; "" where there is none
    before: str
    after: str


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

    def render(self, question: str) -> str:
        """The prompt as text."""
        asked = self._question(question)
        if self.chat:
            return self._prompt([*self._opening, {"role": "user", "content": asked}])
        shown = [self._question(example.prompt) + example.answer for example in self._section.few_shot]
        return BETWEEN_EXAMPLES.join([*shown, asked])

    def ids(self, question: str) -> list[int]:
        """The prompt as tokens."""
        text = self.render(question)
        return _ids(self._tokenizer, text) if self.chat else _begun(self._tokenizer, text)

    def reply_ids(self, reply: str, ended: bool) -> list[int]:
        """The tokens between the model's last turn and its next; `ended`: its last token is an end token.

        Without a chat template they are the reply's, as it is. Whatever a reply says, it makes no special token.

        Raises:
            ConfigError: the chat template does not tell what stands there.
        """
        words = _ids(self._tokenizer, reply, plain=True)
        if not self.chat:
            return words
        seam = self._seam
        before = seam.before if ended else seam.end + seam.before
        return [*_ids(self._tokenizer, before), *words, *_ids(self._tokenizer, seam.after)]

    def _question(self, question: str) -> str:
        return self._section.template.replace("{prompt}", question)

    @property
    def _opening(self) -> list[Message]:
        """All messages before the question."""
        section = self._section
        system = [] if section.system is None else [{"role": "system", "content": section.system}]
        return [
            *system,
            *(
                message
                for example in section.few_shot
                for message in (
                    {"role": "user", "content": self._question(example.prompt)},
                    {"role": "assistant", "content": example.answer},
                )
            ),
        ]

    def _prompt(self, messages: Sequence[Message]) -> str:
        return _applied(self._tokenizer, messages, True, self._section.template_options)

    @cached_property
    def _seam(self) -> _Seam:
        """Read off two conversations, of one reply and of two, and checked against each other and the prompt.

        opening Q after, first-turn end before first-reply after, second-turn end before second-reply after
        """
        said = ("first-turn", "first-reply", "second-turn", "second-reply")
        roles = ("assistant", "user", "assistant", "user")
        question = "the-question"
        messages = [*self._opening, {"role": "user", "content": question}]
        prompt = self._prompt(messages)
        messages += [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]
        once, twice = self._prompt(messages[:-2]), self._prompt(messages)
        opening, after = self._cut(prompt, [question])
        first = self._cut(once, [question, *said[:2]])
        second = self._cut(twice, [question, *said])
        if not (opening == first[0] == second[0]):
            raise _unclear(self._tokenizer, "what it writes before the question changes once there are more turns")
        if not (first[2] == second[2] == second[4]) or not (after == first[3] == second[5]):
            raise _unclear(self._tokenizer, "what it writes around a reply changes from one reply to the next")
        end = _leading_special(self._tokenizer, first[2])
        return _Seam(end, first[2].removeprefix(end), after)

    def _cut(self, text: str, said: Sequence[str]) -> list[str]:
        """What stands before, between and after the texts, which are expected in their order."""
        pieces = []
        for mark in said:
            piece, found, text = text.partition(mark)
            if not found:
                raise _unclear(self._tokenizer, "it does not write every turn and reply as it is given")
            pieces.append(piece)
        return [*pieces, text]


def build_supervised_example(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], template_options: Mapping[str, Any] | None = None
) -> tuple[Array, Array]:
    """A conversation's (T,) int32 tokens and (T,) float32 weights: 1 on what the assistant says and the token that ends
    it, else 0.

    Each part is encoded by itself, so that the assistant's begins just where sampling would begin. Without a chat
    template the texts lie end to end and the assistant's end in the end token.

    Raises:
        ConfigError: no message is the assistant's, or the template does not tell which part of the text is.
    """
    if not any(message["role"] == "assistant" for message in messages):
        raise ConfigError(
            f"messages: found roles {[message['role'] for message in messages]}; wanted at least one 'assistant'"
        )
    if tokenizer.chat_template:
        parts = [
            (_ids(tokenizer, text), taught)
            for text, taught in _taught_parts(tokenizer, messages, template_options or {})
        ]
    else:
        parts = [(_begun(tokenizer, ""), False)]
        for message in messages:
            taught = message["role"] == "assistant"
            ends = [tokenizer.eos_token_id] if taught else []
            parts.append(([*_ids(tokenizer, message["content"]), *ends], taught))
    tokens = [np.array(ids, np.int32) for ids, _ in parts]
    weights = [np.full(len(ids), taught, np.float32) for ids, taught in parts]
    return np.concatenate(tokens), np.concatenate(weights)


def _taught_parts(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], options: Mapping[str, Any]
) -> list[tuple[str, bool]]:
    """The rendered conversation cut into parts, end to end, and whether each is the assistant's."""
    whole = _applied(tokenizer, messages, False, options)
    end = _turn_end(tokenizer, options)
    parts, at = [], 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _applied(tokenizer, messages[:i], True, options)
        stop = whole.find(end, len(prompt))
        if not whole.startswith(prompt) or stop < 0:
            raise _unclear(
                tokenizer,
                f"what it writes before message {i} to prompt the assistant is not what it writes when the message is "
                "there; give each assistant message an example of its own, or other template options",
            )
        parts += [(whole[at : len(prompt)], False), (whole[len(prompt) : stop + len(end)], True)]
        at = stop + len(end)
    return [*parts, (whole[at:], False)]


def _turn_end(tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> str:
    """What the template ends an assistant's message with."""
    said = "the-answer"
    messages = [{"role": "user", "content": "the-question"}, {"role": "assistant", "content": said}]
    end = _leading_special(tokenizer, _applied(tokenizer, messages, False, options).rpartition(said)[2])
    if not end:
        raise _unclear(tokenizer, "it ends the assistant's message in no special token")
    return end


def _leading_special(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The special token that `text` begins with, white space before it included; "" where it begins with none."""
    blank = len(text) - len(text.lstrip())
    specials = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    found = [token for token in specials if token and text.startswith(token, blank)]
    return text[:blank] + max(found, key=len) if found else ""


def _applied(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], prompting: bool, options: Mapping[str, Any]
) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=prompting, **options
            )
        )
    except Exception as error:  # a template is a program of its own, and raises what it likes
        roles = ", ".join(message["role"] for message in messages)
        raise _unclear(tokenizer, f"given messages of {roles} it fails: {error}") from error


def _unclear(tokenizer: PreTrainedTokenizerBase, why: str) -> ConfigError:
    name = tokenizer.name_or_path or "the model"
    return ConfigError(
        f"prompt.chat: the chat template of {name} does not serve here: {why}; use a model with another template, or "
        "prompt.chat=false and prompt.template"
    )


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, plain: bool = False) -> list[int]:
    """Nothing is put before or behind. `plain`: a special token's name in the text is text."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=plain)
    return ids


def _begun(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """With the token that begins a text where the tokenizer puts one and the text does not; with none that ends it."""
    ids, begin = _ids(tokenizer, text), tokenizer.bos_token_id
    if begin is None or begin not in tokenizer.encode("")[:1] or ids[:1] == [begin]:
        return ids
    return [begin, *ids]
