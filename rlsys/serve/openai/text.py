"""Text of a base's tokenizer in the HTTP process: prompts to token ids, tokens to text and bytes."""

from __future__ import annotations

import inspect
import json
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

from rlsys.client.backend import About
from rlsys.client.tokenizing import has_tokenizer, tokenizer_of
from rlsys.errors import ConfigError
from rlsys.serve.openai.errors import DoorRefusal
from rlsys.tokenization.chat_template import apply_template
from rlsys.tokenization.control_tokens import control_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # a byte in tokenizers with byte fallback
_SPACE = "\u2581"  # a space in sentencepiece's tokens


@dataclass(frozen=True, slots=True)
class Token:
    """A token for people: text, or `bytes:\\x..` if its bytes alone are no UTF-8."""

    text: str
    data: bytes


class TextCodec:
    """One base's tokenizer. Loaded with the first call, which takes seconds: call in a thread. Calls exclude each
    other: a tokenizer is not thread-safe."""

    def __init__(self, about: About) -> None:
        self._about = about
        self._lock = threading.Lock()
        self._tokens: dict[int, Token] = {}

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return tokenizer_of(self._about)

    def encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        """
        Raises:
            DoorRefusal: the base has no tokenizer.
        """
        with self._lock:
            tokenizer = self._loaded("prompt")
            return [tokenizer.encode(text, add_special_tokens=add_special_tokens) for text in texts]

    def chat(self, messages: Sequence[Mapping[str, str]], options: Mapping[str, Any]) -> list[int]:
        """Token ids of a conversation with the start of the next answer. Special tokens come from the template alone:
        a message that spells one stays text.

        Raises:
            DoorRefusal: no chat template, one that refuses these messages, or an option that is not the template's.
        """
        with self._lock:
            tokenizer = self._loaded("messages")
            if not tokenizer.chat_template:
                raise DoorRefusal(
                    "messages: this model's tokenizer has no chat template; wanted /v1/completions with a prompt",
                    "messages",
                )
            taken = [name for name in options if name in inspect.signature(tokenizer.apply_chat_template).parameters]
            if taken:
                raise DoorRefusal(
                    f"chat_template_kwargs: found {taken[0]!r}; wanted variables of the model's chat template",
                    "chat_template_kwargs",
                )
            controls = control_tokens(tokenizer)
            protected = [{"role": each["role"], "content": controls.protect(each["content"])} for each in messages]
            try:
                return controls.ids(apply_template(tokenizer, protected, True, options))
            except ConfigError as error:
                raise DoorRefusal(f"messages: {error}", "messages") from None

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a prompt, special tokens included."""
        with self._lock:
            if not has_tokenizer(self._about):
                return ""
            text: str = self._tokenizer.decode(list(ids))
            return text

    def token(self, id_: int) -> Token:
        found = self._tokens.get(id_)
        if found is None:
            with self._lock:
                found = self._tokens[id_] = self._token(id_)
        return found

    def _loaded(self, param: str) -> PreTrainedTokenizerBase:
        try:
            return self._tokenizer
        except ConfigError:
            raise DoorRefusal(f"{param}: this model has no tokenizer; wanted token ids as prompt", param) from None

    def _token(self, id_: int) -> Token:
        data = self._bytes(id_)
        if data is None:
            return Token(f"token_id:{id_}", b"")
        try:
            return Token(data.decode("utf-8"), data)
        except UnicodeDecodeError:
            return Token("bytes:" + "".join(f"\\x{byte:02x}" for byte in data), data)

    def _bytes(self, id_: int) -> bytes | None:
        """The bytes that a token stands for; None: the tokenizer has no such token."""
        if not has_tokenizer(self._about):
            return None
        tokenizer = self._tokenizer
        name: str | None = tokenizer.convert_ids_to_tokens(id_)
        if name is None:
            return None
        if self._is_byte_level:
            if id_ in tokenizer.added_tokens_decoder:
                return name.encode()
            alphabet = _byte_alphabet()
            return b"".join(bytes([alphabet[char]]) if char in alphabet else char.encode() for char in name)
        if match := _BYTE.fullmatch(name):
            return bytes([int(match[1], 16)])
        return name.replace(_SPACE, " ").encode()

    @cached_property
    def _is_byte_level(self) -> bool:
        if not getattr(self._tokenizer, "is_fast", False):
            return False
        decoder = json.loads(self._tokenizer.backend_tokenizer.to_str())["decoder"]
        steps = (decoder or {}).get("decoders", [decoder or {}])
        return any(step.get("type") == "ByteLevel" for step in steps)


@cache
def _byte_alphabet() -> dict[str, int]:
    """Character in a byte-level token -> byte: printable bytes of Latin-1 are themselves, the others follow from
    U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}
