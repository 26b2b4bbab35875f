"""Determines the stop tokens of a model, for samplers, evaluation, clients and supervised examples.

A model's folder defines them in up to four places: generation_config.json, config.json, the tokenizer, and the chat
template, which ends the assistant's message. The places often name different tokens, for example a base model's config
with a chat tokenizer, or a fine-tuned template with the base model's generation_config.json. A sampler that used only
one place would run completions to the length limit. Here a token from any place ends a completion.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsInt, cast

from rlsys.config import yaml_text
from rlsys.errors import ConfigError
from rlsys.tokenization.chat_template import last_turn_end
from rlsys.tokenization.control_tokens import control_tokens, special_tokens
from rlsys.tokenization.tokenizer_class import tokenizer_class
from rlsys.utils.text_files import first_line, why_undecodable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENIZER_TEXTS = ("*token*.json", "vocab.json", "chat_template*.json", "*.jinja", "*.txt")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
GENERATION, CONFIG, TOKENIZER, TEMPLATE = "generation_config.json", "config.json", "the tokenizer", "the chat template"


@dataclass(frozen=True, slots=True)
class StopConditions:
    """Stop tokens of a model, and its special tokens. A completion includes the stop token that ended it."""

    ids: tuple[int, ...]  # stop tokens
    by_place: Mapping[str, tuple[int, ...]]  # place -> stop tokens that it names, without empty places
    specials: Mapping[str, int]  # special tokens: text -> id
    notes: tuple[str, ...]  # messages about contradictions between the places

    def stops(self, strings: Sequence[str]) -> tuple[list[str], list[int]]:
        """Split stop strings into (texts, token ids).

        A stop string that is a special token becomes its id, because decoded text does not contain special tokens.

        Raises:
            ConfigError: a stop string combines a special token with other text, and could never match.
        """
        texts = [text for text in strings if text not in self.specials]
        for text in texts:
            # a special token of letters and digits may occur inside a word
            hidden = [special for special in self.specials if special in text and not special.isalnum()]
            if hidden:
                raise ConfigError(
                    f"stop: found {text!r}; the special token {max(hidden, key=len)!r} never occurs in decoded text, "
                    "so this would never stop a completion; wanted the token alone, or text without it"
                )
        return texts, [self.specials[text] for text in strings if text in self.specials]


def stop_conditions_of(folder: Path) -> StopConditions:
    """Return the stop conditions of a model's folder; without a tokenizer, those of its configuration files.

    Raises:
        ConfigError: the configuration is missing or damaged, the tokenizer cannot be loaded, or the configuration names
            an invalid token id, or a token that is ordinary text in the tokenizer.
    """
    in_config = stop_tokens_by_place(folder)
    config = _object(folder / CONFIG) or {}
    if not has_tokenizer(folder):
        return _merged(str(folder), in_config, {}, embedding_rows(config), None)
    tokenizer = load_tokenizer(folder)
    return _merged(str(folder), in_config, _of_tokenizer(tokenizer), embedding_rows(config), tokenizer)


def stop_tokens_by_place(folder: Path) -> Mapping[str, tuple[int, ...]]:
    """Return the stop tokens in the configuration files of a model, by file name.

    Raises:
        ConfigError: the configuration is missing or damaged, or names an invalid token id.
    """
    config, generation = _object(folder / CONFIG), _object(folder / GENERATION) or {}
    if config is None:
        raise ConfigError(f"model.path: {folder} has no config.json; wanted a model folder in Hugging Face format")
    in_config = _ids(config, f"{folder}/{CONFIG}: ")
    in_text = _ids(config.get("text_config") or {}, f"{folder}/{CONFIG}: text_config.")
    return {GENERATION: _ids(generation, f"{folder}/{GENERATION}: "), CONFIG: in_config or in_text}


def stop_conditions_of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> StopConditions:
    """Return the stop conditions of a tokenizer alone, for a base model that is trained from scratch."""
    return _merged(tokenizer.name_or_path or "the model", {}, _of_tokenizer(tokenizer), None, tokenizer)


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the EOS token, which ends a supervised text without a chat template.

    Raises:
        ConfigError: the tokenizer has no EOS token.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"model.path: the tokenizer of {tokenizer.name_or_path or 'the model'} has no eos_token, so the model "
            "could not learn where a text ends; wanted eos_token in tokenizer_config.json"
        )
    return int(tokenizer.eos_token_id)


def has_tokenizer(folder: Path) -> bool:
    """Return whether a model's folder contains tokenizer files."""
    return any((folder / name).exists() for name in TOKENIZER_FILES)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model's folder with transformers, without running code from the folder.

    Raises:
        ConfigError: transformers cannot load it.
    """
    import transformers  # takes a second, which drivers of models that are trained from scratch do not need

    name = tokenizer_class(folder) or "AutoTokenizer"  # which imports torch
    try:
        tokenizer: PreTrainedTokenizerBase = getattr(transformers, name).from_pretrained(
            folder, trust_remote_code=False
        )
        return tokenizer
    except Exception as error:  # a damaged file, an unknown format or class: the library raises many types
        texts = sorted(path for name in _TOKENIZER_TEXTS for path in folder.glob(name) if path.is_file())
        why = why_undecodable(texts) or first_line(error)  # the library's messages do not name the file
        raise ConfigError(
            f"model.path: the tokenizer in {folder} cannot be loaded ({why}); wanted tokenizer.json and "
            "tokenizer_config.json in the format of save_pretrained"
        ) from error


def read_json(path: Path) -> Any:  # Any: parsed JSON, whose types the reader of each key checks
    """Read a JSON file of a model's folder; None if it does not exist.

    Raises:
        ConfigError: the file cannot be read or is not valid JSON.
    """
    if not path.exists():
        return None
    try:
        return yaml_text.read_json(path.read_text(encoding="utf-8"), f"model.path: {path}")
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"model.path: {path} is not valid JSON ({error}); copy the file again") from error
    except OSError as error:
        raise ConfigError(f"model.path: {path} cannot be read: {error.strerror}") from error


def embedding_rows(config: Mapping[str, object]) -> int | None:
    """Return the number of embedding rows (vocab_size) in a config.json; None if it is not given.

    In the configuration of a text-and-image model, the value of the text part.
    """
    inner = config.get("text_config")
    rows = config.get("vocab_size", inner.get("vocab_size") if isinstance(inner, Mapping) else None)
    return None if rows is None else int(cast(SupportsInt, rows))  # int() refuses what is no number


def _of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, tuple[int, ...]]:
    eos = tokenizer.eos_token_id
    by_place: dict[str, tuple[int, ...]] = {TOKENIZER: () if eos is None else (int(eos),)}
    if tokenizer.chat_template:
        try:
            end = last_turn_end(tokenizer, {}).strip()
        except ConfigError:  # not a template for such a conversation; prompts that use it raise their own error
            end = ""
        ids = control_tokens(tokenizer).ids_by_text
        by_place[TEMPLATE] = (ids[end],) if end else ()
    return by_place


def _merged(
    source: str,
    in_config: Mapping[str, tuple[int, ...]],
    in_tokenizer: Mapping[str, tuple[int, ...]],
    rows: int | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> StopConditions:
    """Merge the stop tokens of all places; tokens that the embedding of `rows` rows lacks are left out."""
    by_place = {place: ids for place, ids in {**in_config, **in_tokenizer}.items() if ids}
    if tokenizer is not None:
        _refuse_words(source, in_config, tokenizer)
    out_of_range = {id_ for ids in by_place.values() for id_ in ids if rows is not None and id_ >= rows}
    ids_in_range = dict.fromkeys(id_ for ids in by_place.values() for id_ in ids if id_ not in out_of_range)
    specials = {} if tokenizer is None else control_tokens(tokenizer).ids_by_text
    notes = _notes(source, in_config, in_tokenizer, tuple(ids_in_range), sorted(out_of_range), tokenizer)
    return StopConditions(tuple(ids_in_range), by_place, specials, notes)


def _refuse_words(source: str, in_config: Mapping[str, tuple[int, ...]], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ConfigError for a stop token that is an ordinary word: it would end completions in mid-sentence."""
    known = {*special_tokens(tokenizer), *tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    for place, ids in in_config.items():
        for id_ in ids:
            if id_ in known or id_ >= len(tokenizer):
                continue
            eos = f"{tokenizer.eos_token!r} ({tokenizer.eos_token_id})" if tokenizer.eos_token else "none"
            raise ConfigError(
                f"model.path: {source}/{place}: eos_token_id {id_} is {tokenizer.decode([id_])!r} in the tokenizer, an "
                f"ordinary token that would end completions too early; the tokenizer's eos_token is {eos}. Set "
                "eos_token_id to it in config.json and generation_config.json, or use the tokenizer that belongs to "
                "the model"
            )


def _notes(
    source: str,
    in_config: Mapping[str, tuple[int, ...]],
    in_tokenizer: Mapping[str, tuple[int, ...]],
    all_ids: tuple[int, ...],
    out_of_range: Sequence[int],
    tokenizer: PreTrainedTokenizerBase | None,
) -> tuple[str, ...]:
    if not in_config:
        return ()
    notes = []
    config_ids = {id_ for ids in in_config.values() for id_ in ids}
    added = {
        id_: [place for place in in_tokenizer if id_ in in_tokenizer[place]] for id_ in all_ids if id_ not in config_ids
    }
    if tokenizer is not None and added:
        tokens = ", ".join(
            f"{_format_token(id_, tokenizer)} of {' and '.join(places)}" for id_, places in added.items()
        )
        configured = ", ".join(_format_token(id_, tokenizer) for id_ in sorted(config_ids)) or "no end token"
        notes.append(f"{source}: completions also end with {tokens}, although the configuration names {configured}")
    if out_of_range:
        tokens = ", ".join(_format_token(id_, tokenizer) for id_ in out_of_range)
        notes.append(f"{source}: the end token {tokens} is outside of the embedding, so the model can never sample it")
    return tuple(notes)


def _format_token(id_: int, tokenizer: PreTrainedTokenizerBase | None) -> str:
    text = None if tokenizer is None or id_ >= len(tokenizer) else tokenizer.convert_ids_to_tokens(id_)
    return f"{id_}" if text is None else f"{text} ({id_})"


def _object(path: Path) -> Mapping[str, object] | None:
    content = read_json(path)
    if content is not None and not isinstance(content, dict):
        raise ConfigError(f"model.path: {path} holds {type(content).__name__}; wanted a JSON object")
    return content


def _ids(fields: object, where: str) -> tuple[int, ...]:
    """Return the eos_token_id values of a configuration; `where` is its file and section, for errors."""
    if not isinstance(fields, dict):
        section = where.rstrip(".")
        raise ConfigError(f"model.path: {section} is {fields!r}; wanted a JSON object")
    eos = fields.get("eos_token_id")
    ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
    if not all(type(id_) is int and id_ >= 0 for id_ in ids):  # isinstance would accept True
        raise ConfigError(
            f"model.path: {where}eos_token_id is {json.dumps(eos)}; wanted a token id such as 2, a list of them, or "
            "null if the model has no stop token"
        )
    return tuple(dict.fromkeys(ids))
