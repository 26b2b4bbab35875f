"""Text from data that spells a control token stays text: only a chat template, or the job's own prompt, writes one.

A tokenizer turns ``<|im_end|>`` into the end of a turn wherever it reads it, in a problem taken from the web too. Here
every text from data is protected before it enters a template: what spells a special token is replaced by a mark. When
the whole is encoded, a mark becomes the tokens of what it spells, letter for letter, and special tokens are those alone
that the template wrote.

Tokens that are in the vocabulary but not special, such as ``<think>`` of Qwen3, are text: they are visible, and answers
that are taught contain them.
"""

from __future__ import annotations

import re
import secrets
from functools import cached_property, lru_cache
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase

from rlsys.errors import ConfigError

_SECRET = secrets.token_hex(16)  # no text from outside can spell a mark; ids do not depend on it
_MARK = re.compile(f"M{_SECRET}M([0-9]+)M")


class ControlTokens:
    """The special tokens of one tokenizer, and the way around them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        found = {str(token): (id_, token) for id_, token in special_tokens(tokenizer).items() if str(token)}
        self._texts = sorted(found, key=lambda text: (-len(text), text))  # of two that begin alike, the longer one
        self._ids = {text: found[text][0] for text in found}
        self._tokens = {text: found[text][1] for text in found}
        self._all = frozenset(self._ids.values())
        self._spelled = re.compile("|".join(map(re.escape, self._texts))) if found else None

    @property
    def ids_by_text(self) -> dict[str, int]:
        return dict(self._ids)

    def protect(self, text: str) -> str:
        """The text with a mark in place of everything that spells a special token."""
        if self._spelled is None:
            return text
        return self._spelled.sub(lambda found: f"M{_SECRET}M{self._texts.index(found[0])}M", text)

    def readable(self, text: str) -> str:
        """The text with every mark spelled out again."""
        return _MARK.sub(lambda found: self._texts[int(found[1])], text)

    def ids(self, text: str) -> list[int]:
        """The tokens of a text, none put before or behind.

        Raises:
            ConfigError: there are marks, and the tokenizer cannot encode what they spell as text.
        """
        if _MARK.search(text) is None:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
            if self._written_by(ids) == self._spelled_in(text):
                return ids
        return self.ids_with_marks(text)

    def _written_by(self, ids: list[int]) -> list[int]:
        return [id_ for id_ in ids if id_ in self._all]

    def _spelled_in(self, text: str) -> list[int]:
        """Fewer than the tokenizer finds where it normalises first: full-width letters become those of a token."""
        return [] if self._spelled is None else [self._ids[found] for found in self._spelled.findall(text)]

    def ids_with_marks(self, text: str) -> list[int]:
        """As ``ids``, by the way that marks take: equal to the ordinary one where there are none."""
        inner, controls, names = self._twin
        if self._spelled is not None:
            text = self._spelled.sub(lambda found: names[found[0]], text)
        found: list[int] = inner.encode(self.readable(text), add_special_tokens=False).ids
        forged = sorted(self._all.intersection(found))
        if forged:
            told = ", ".join(self._tokenizer.convert_ids_to_tokens(forged))
            raise ConfigError(
                f"prompt: a text spells the control tokens {told} and the tokenizer has no other way to write them; "
                "leave such texts out of the data"
            )
        return [controls.get(id_, id_) for id_ in found]

    @cached_property
    def _twin(self) -> tuple[Tokenizer, dict[int, int], dict[str, str]]:
        """A copy of the tokenizer in which controls go by secret names, and their old names are text.

        Returns it, the control that each id of a secret name stands for, and the secret name of each control.
        """
        if not getattr(self._tokenizer, "is_fast", False):
            raise ConfigError(
                "prompt: a text spells one of the tokenizer's control tokens, and this tokenizer, which has no "
                "tokenizer.json, cannot encode that as text; leave such texts out of the data, or save the tokenizer "
                "as tokenizer.json"
            )
        inner = Tokenizer.from_str(self._tokenizer.backend_tokenizer.to_str())
        inner.no_truncation()
        inner.no_padding()
        names = {text: f"C{_SECRET}C{i}C" for i, text in enumerate(self._texts)}
        inner.add_tokens([_renamed(self._tokens[text], name) for text, name in names.items()])
        inner.encode_special_tokens = True
        controls = {}
        for text, name in names.items():
            id_ = inner.token_to_id(name)
            assert id_ is not None
            controls[id_] = self._ids[text]
        return inner, controls, names


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, Any]:
    """Id -> token of those that text must not become, and that decoding for a reader leaves out."""
    named = set(tokenizer.all_special_ids)
    return {id_: token for id_, token in tokenizer.added_tokens_decoder.items() if token.special or id_ in named}


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> ControlTokens:
    """Of this tokenizer as it is now; found once."""
    return _found(tokenizer, len(tokenizer))


@lru_cache(maxsize=4)
def _found(tokenizer: PreTrainedTokenizerBase, size: int) -> ControlTokens:
    return ControlTokens(tokenizer)


def _renamed(token: Any, name: str) -> AddedToken:
    """With the same claim on the space around it. Not special, as the twin takes special ones for text."""
    return AddedToken(
        name,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=False,
        special=False,
    )
