"""What ends a completion, read in one place for samplers, evaluation, clients and what is taught.

A model's folder says it in up to four places: generation_config.json, config.json, the tokenizer, and the chat
template, which ends the assistant's message. They often name different tokens (a base model's config beside a chat
tokenizer, a fine-tuned template beside the base's generation_config.json), and a sampler that follows one of them alone
lets completions run on to the limit. Any token named in any place ends a completion here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlsys.config import yaml_text
from rlsys.errors import ConfigError
from rlsys.tokenization.chat_template import last_turn_end
from rlsys.tokenization.control_tokens import control_tokens, special_tokens
from rlsys.utils.text_files import first_line, why_undecodable

_TOKENIZER_TEXTS = ("*token*.json", "vocab.json", "chat_template*.json", "*.jinja", "*.txt")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
GENERATION, CONFIG, TOKENIZER, TEMPLATE = "generation_config.json", "config.json", "the tokenizer", "the chat template"


@dataclass(frozen=True, slots=True)
class StopConditions:
    """The tokens that end a completion, each of which is part of it, and the special tokens by text."""

    ids: tuple[int, ...]
    by_place: Mapping[str, tuple[int, ...]]  # of each place that names any
    specials: Mapping[str, int]
    notes: tuple[str, ...]  # where the places disagree

    def stops(self, strings: Sequence[str]) -> tuple[list[str], list[int]]:
        """(texts, token ids) for stop strings: one that is a special token is its id, as no text shows it.

        Raises:
            ConfigError: a special token beside other text, which would never be found.
        """
        texts = [text for text in strings if text not in self.specials]
        for text in texts:
            # one that is letters and digits may stand within a word
            hidden = [special for special in self.specials if special in text and not special.isalnum()]
            if hidden:
                raise ConfigError(
                    f"stop: found {text!r}; the special token {max(hidden, key=len)!r} is no text, so this would never "
                    "stop a completion; wanted the token alone, or text without it"
                )
        return texts, [self.specials[text] for text in strings if text in self.specials]


def stop_conditions_of(folder: Path) -> StopConditions:
    """Of a model's folder; one without a tokenizer has those of its configuration.

    Raises:
        ConfigError: the configuration is missing or damaged, the tokenizer cannot be loaded, or the configuration names
            what is no token id, or a token that the tokenizer takes for ordinary text.
    """
    named = stop_tokens_by_place(folder)
    config = _object(folder / CONFIG) or {}
    if not has_tokenizer(folder):
        return _joined(str(folder), named, {}, rows_of(config), None)
    tokenizer = load_tokenizer(folder)
    return _joined(str(folder), named, _of_tokenizer(tokenizer), rows_of(config), tokenizer)


def stop_tokens_by_place(folder: Path) -> Mapping[str, tuple[int, ...]]:
    """The ends that the configuration of a model names, by file.

    Raises:
        ConfigError: it is missing or damaged, or names what is no token id.
    """
    config, generation = _object(folder / CONFIG), _object(folder / GENERATION) or {}
    if config is None:
        raise ConfigError(f"model.path: {folder} has no config.json; wanted a Hugging Face model folder")
    in_config = _ids(config, f"{folder}/{CONFIG}: ")
    in_text = _ids(config.get("text_config") or {}, f"{folder}/{CONFIG}: text_config.")
    return {GENERATION: _ids(generation, f"{folder}/{GENERATION}: "), CONFIG: in_config or in_text}


def stop_conditions_of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> StopConditions:
    """Of a tokenizer alone, for a base that is being made."""
    return _joined(tokenizer.name_or_path or "the model", {}, _of_tokenizer(tokenizer), None, tokenizer)


def text_end(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that a taught text ends with where no chat template ends it.

    Raises:
        ConfigError: the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"model.path: the tokenizer of {tokenizer.name_or_path or 'the model'} names no eos_token, so nothing "
            "would teach where a text ends; wanted eos_token in tokenizer_config.json"
        )
    return int(tokenizer.eos_token_id)


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).exists() for name in TOKENIZER_FILES)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """
    Raises:
        ConfigError: the folder holds none that transformers can load without code of the folder's own.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # of a damaged file, of another library's format, or of a class that is not known
        texts = sorted(path for name in _TOKENIZER_TEXTS for path in folder.glob(name) if path.is_file())
        why = why_undecodable(texts) or first_line(error)  # the library leaves the file out of its messages
        raise ConfigError(
            f"model.path: the tokenizer in {folder} cannot be loaded ({why}); wanted tokenizer.json and "
            "tokenizer_config.json as save_pretrained writes them"
        ) from error


def read_json(path: Path) -> Any:
    """None where there is no such file.

    Raises:
        ConfigError: it is no JSON.
    """
    if not path.exists():
        return None
    try:
        return yaml_text.read_json(path.read_text(encoding="utf-8"), f"model.path: {path}")
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"model.path: {path} is no JSON ({error}); copy the file again") from error
    except OSError as error:
        raise ConfigError(f"model.path: {path} cannot be read: {error.strerror}") from error


def rows_of(config: Mapping[str, Any]) -> int | None:
    """Of the embedding; in a text-and-image configuration, of its text part."""
    rows = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
    return None if rows is None else int(rows)


def _of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, tuple[int, ...]]:
    eos = tokenizer.eos_token_id
    found: dict[str, tuple[int, ...]] = {TOKENIZER: () if eos is None else (int(eos),)}
    if tokenizer.chat_template:
        try:
            end = last_turn_end(tokenizer, {}).strip()
        except ConfigError:  # a template of another form of conversation; it is judged where it is used
            end = ""
        ids = control_tokens(tokenizer).ids_by_text
        found[TEMPLATE] = (ids[end],) if end else ()
    return found


def _joined(
    source: str,
    named: Mapping[str, tuple[int, ...]],
    own: Mapping[str, tuple[int, ...]],
    rows: int | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> StopConditions:
    by_place = {place: ids for place, ids in {**named, **own}.items() if ids}
    if tokenizer is not None:
        _refuse_words(source, named, tokenizer)
    beyond = {id_ for ids in by_place.values() for id_ in ids if rows is not None and id_ >= rows}
    every = dict.fromkeys(id_ for ids in by_place.values() for id_ in ids if id_ not in beyond)
    specials = {} if tokenizer is None else control_tokens(tokenizer).ids_by_text
    notes = _notes(source, named, own, tuple(every), sorted(beyond), tokenizer)
    return StopConditions(tuple(every), by_place, specials, notes)


def _refuse_words(source: str, named: Mapping[str, tuple[int, ...]], tokenizer: PreTrainedTokenizerBase) -> None:
    """An end that is a word would cut completions in the middle of a sentence."""
    known = {*special_tokens(tokenizer), *tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    for place, ids in named.items():
        for id_ in ids:
            if id_ in known or id_ >= len(tokenizer):
                continue
            eos = f"{tokenizer.eos_token!r} ({tokenizer.eos_token_id})" if tokenizer.eos_token else "none"
            raise ConfigError(
                f"model.path: {source}/{place}: eos_token_id {id_} is {tokenizer.decode([id_])!r} in the tokenizer, an "
                f"ordinary token, at which completions would end; the tokenizer's own end is {eos}. Set eos_token_id "
                "to that, in config.json and generation_config.json, or use the tokenizer that belongs to the model"
            )


def _notes(
    source: str,
    named: Mapping[str, tuple[int, ...]],
    own: Mapping[str, tuple[int, ...]],
    every: tuple[int, ...],
    beyond: Sequence[int],
    tokenizer: PreTrainedTokenizerBase | None,
) -> tuple[str, ...]:
    if not named:
        return ()
    notes = []
    said = {id_ for ids in named.values() for id_ in ids}
    missing = {id_: [place for place in own if id_ in own[place]] for id_ in every if id_ not in said}
    if tokenizer is not None and missing:
        told = ", ".join(
            f"{_format_token(id_, tokenizer)} of {' and '.join(places)}" for id_, places in missing.items()
        )
        others = ", ".join(_format_token(id_, tokenizer) for id_ in sorted(said)) or "no end token"
        notes.append(f"{source}: completions end with {told} too, though its configuration names {others}")
    if beyond:
        told = ", ".join(_format_token(id_, tokenizer) for id_ in beyond)
        notes.append(f"{source}: the end token {told} lies beyond the embedding, so the model can never write it")
    return tuple(notes)


def _format_token(id_: int, tokenizer: PreTrainedTokenizerBase | None) -> str:
    text = None if tokenizer is None or id_ >= len(tokenizer) else tokenizer.convert_ids_to_tokens(id_)
    return f"{id_}" if text is None else f"{text} ({id_})"


def _object(path: Path) -> Mapping[str, Any] | None:
    found = read_json(path)
    if found is not None and not isinstance(found, dict):
        raise ConfigError(f"model.path: {path} holds {type(found).__name__}; wanted an object of names and values")
    return found


def _ids(fields: Any, where: str) -> tuple[int, ...]:
    """`where`: file, and the section in it."""
    if not isinstance(fields, dict):
        section = where.rstrip(".")
        raise ConfigError(f"model.path: {section} is {fields!r}; wanted an object of names and values")
    eos = fields.get("eos_token_id")
    ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
    if not all(type(id_) is int and id_ >= 0 for id_ in ids):  # True is an int to Python, and token 1 to others
        raise ConfigError(
            f"model.path: {where}eos_token_id is {json.dumps(eos)}; wanted a token id such as 2, a list of them, or "
            "null where the model names no end"
        )
    return tuple(dict.fromkeys(ids))
