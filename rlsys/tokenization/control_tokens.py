"""Prevents control-token injection: only the chat template or the job's prompt can produce a special token.

A tokenizer encodes ``<|im_end|>`` as the end of a turn wherever it occurs, also inside a problem from the web. Here,
every text from data is protected before it is inserted into a template: each substring that spells a special token is
replaced by a mark. When the rendered prompt is encoded, a mark becomes ordinary tokens that spell the same substring.
Special tokens therefore come only from the template.

Added tokens that are not special, such as ``<think>`` of Qwen3, are treated as text: they are visible, and supervised
answers contain them.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Tokenizer

from rlsys.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SECRET = secrets.token_hex(16)  # random, so that no data can contain a mark; token ids do not depend on it
AT_ONCE = 256  # texts of a call: the tokenizer's result has a hundred bytes and more of each token
_MARK = re.compile(f"M{_SECRET}M([0-9]+)M")


class ControlTokens:
    """Special tokens of a tokenizer, and an encoder that produces them only from unprotected text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        specials = {str(token): (id_, token) for id_, token in special_tokens(tokenizer).items() if str(token)}
        self._texts = sorted(specials, key=lambda text: (-len(text), text))  # a longer match has precedence
        self._ids = {text: specials[text][0] for text in specials}
        self._tokens = {text: specials[text][1] for text in specials}
        self._all = frozenset(self._ids.values())
        self._spelled = re.compile("|".join(map(re.escape, self._texts))) if specials else None

    @property
    def ids_by_text(self) -> dict[str, int]:
        """Special tokens: text -> id."""
        return dict(self._ids)

    def protect(self, text: str) -> str:
        """Replace every substring that spells a special token by a mark."""
        if self._spelled is None:
            return text
        return self._spelled.sub(lambda match: f"M{_SECRET}M{self._texts.index(match[0])}M", text)

    def readable(self, text: str) -> str:
        """Replace every mark by the substring that it stands for."""
        return _MARK.sub(lambda match: self._texts[int(match[1])], text)

    def ids(self, text: str) -> list[int]:
        """Encode a text with marks; no special tokens are added at the start or end.

        Raises:
            ConfigError: the text has marks, and the tokenizer cannot encode their substrings as ordinary tokens.
        """
        return self.ids_of_each([text])[0]

    def ids_of_each(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode texts, each as `ids` does, with few calls of the tokenizer."""
        starts = range(0, len(texts), AT_ONCE)
        return [ids for start in starts for ids in self._encoded(texts[start : start + AT_ONCE])]

    def _encoded(self, texts: Sequence[str]) -> Iterator[list[int]]:
        rows = self._tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        for text, ids in zip(texts, rows, strict=True):
            is_plain = _MARK.search(text) is None and self._special_ids(ids) == self._spelled_ids(text)
            yield ids if is_plain else self.ids_with_marks(text)

    def _special_ids(self, ids: list[int]) -> list[int]:
        return [] if self._all.isdisjoint(ids) else [id_ for id_ in ids if id_ in self._all]

    def _spelled_ids(self, text: str) -> list[int]:
        """Return the special tokens that the text spells literally.

        The tokenizer may find more if it normalizes first, for example full-width letters to those of a token.
        """
        return [] if self._spelled is None else [self._ids[special] for special in self._spelled.findall(text)]

    def ids_with_marks(self, text: str) -> list[int]:
        """Encode as ``ids`` does, always by way of the renamed tokenizer; without marks the result is the same."""
        inner, controls, names = self._renamed_tokenizer
        if self._spelled is not None:
            text = self._spelled.sub(lambda match: names[match[0]], text)
        ids: list[int] = inner.encode(self.readable(text), add_special_tokens=False).ids
        injected = sorted(self._all.intersection(ids))
        if injected:
            tokens = ", ".join(self._tokenizer.convert_ids_to_tokens(injected))
            raise ConfigError(
                f"prompt: a text contains the control tokens {tokens}, and the tokenizer cannot encode them as "
                "ordinary text; remove such texts from the data"
            )
        return [controls.get(id_, id_) for id_ in ids]

    @cached_property
    def _renamed_tokenizer(self) -> tuple[Tokenizer, dict[int, int], dict[str, str]]:
        """Build a copy of the tokenizer whose special tokens have secret names, so that the old names are plain text.

        Returns the copy, a map from the ids of secret names to the original ids, and one from special token to secret
        name.
        """
        if not getattr(self._tokenizer, "is_fast", False):
            raise ConfigError(
                "prompt: a text contains one of the tokenizer's control tokens, and this tokenizer, which has no "
                "tokenizer.json, cannot encode it as ordinary text; remove such texts from the data, or save the "
                "tokenizer as tokenizer.json"
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


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, AddedToken]:
    """Return {id: token} of the special tokens: text from data must not produce them, and decoding may skip them."""
    special_ids = set(tokenizer.all_special_ids)
    return {id_: token for id_, token in tokenizer.added_tokens_decoder.items() if token.special or id_ in special_ids}


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> ControlTokens:
    """Return the control tokens of a tokenizer; cached until its vocabulary grows."""
    return _cached_control_tokens(tokenizer, len(tokenizer))


@lru_cache(maxsize=4)
def _cached_control_tokens(tokenizer: PreTrainedTokenizerBase, size: int) -> ControlTokens:
    return ControlTokens(tokenizer)


def _renamed(token: AddedToken, name: str) -> AddedToken:
    """Return a token with another text and the same stripping options.

    It is not special, because the renamed tokenizer encodes special tokens as text.
    """
    return AddedToken(
        name,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=False,
        special=False,
    )
