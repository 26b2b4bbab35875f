"""Checks a model folder within seconds, before Ray, a learner or an engine starts.

Reads files and headers, but no weights. A difference that does not prevent training is returned as a note; otherwise an
error says what was found, where, and what would be right.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TypedDict

from transformers import PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from rlsys import tasks
from rlsys.config import JobConfig
from rlsys.errors import ConfigError
from rlsys.tokenization.renderer import Renderer
from rlsys.tokenization.stop_conditions import (
    StopConditions,
    embedding_rows,
    has_tokenizer,
    load_tokenizer,
    read_json,
    stop_conditions_of,
    stop_tokens_by_place,
)
from rlsys.utils.shell_paths import command

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PLAIN_DTYPES = ("F32", "F16", "BF16")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
LARGEST_HEADER = 100 * 2**20  # bytes; the limit of the safetensors format
PROBE = "What is 2 + 2?"
HOW_FROM_GGUF = (
    "convert the weights to safetensors first: AutoModelForCausalLM.from_pretrained(folder, gguf_file=..., "
    "quantization_config=GgufConfig(dequantize=True)), as examples/real_model.py does"
)


class TensorEntry(TypedDict):
    dtype: str
    shape: list[int]
    data_offsets: list[int]


Header = Mapping[str, TensorEntry]  # of a safetensors file, by tensor name


def check_job(config: JobConfig) -> tuple[str, ...]:
    """Check model.path if it is a folder on this machine, and return notes for the user. Otherwise the actor's node
    checks it.

    Raises:
        ConfigError: the job cannot use this model.
    """
    if config.model.path is None:
        return ()
    folder = Path(config.model.path)
    if folder.is_file():
        raise ConfigError(f"model.path: {folder} is a file; wanted a folder. {_about_file(folder)}")
    if not folder.is_dir():
        return ()
    check_files(folder)
    if not has_tokenizer(folder):
        raise ConfigError(
            f"model.path: {folder} has no tokenizer; wanted tokenizer.json and tokenizer_config.json beside the "
            "weights, as tokenizer.save_pretrained(folder) writes them"
        )
    tokenizer, endings = load_tokenizer(folder), stop_conditions_of(folder)
    renderer = Renderer(tokenizer, config.prompt)
    notes = [*endings.notes, *check_tokens(folder, tokenizer, renderer.ids(PROBE))]
    if not renderer.chat and config.prompt.chat is None:
        notes.append(f"{folder}: the tokenizer has no chat template, so prompts are plain text (prompt.template)")
    if config.lora.train_unembed and _is_tied(folder):
        notes.append(
            f"lora.train_unembed: {folder} ties its output layer to its embeddings, and PEFT's merge_and_unload() "
            "would add the adapter to both; for a merged model use `rlsys export --merged`"
        )
    stops = list(config.rl.sampling.stop or ())
    if tasks.converses(config.task):
        renderer.reply_ids("a reply", None, False)  # raises if the template cannot render a reply
    endings.stops(stops)
    if not endings.ids and config.rl.sampling.stop is None:
        raise ConfigError(_endless(folder, endings))
    return tuple(notes)


def _is_tied(folder: Path) -> bool:
    from rlsys.modeling.text_part import is_tied  # imports torch, which plans of other jobs do not need

    return bool(is_tied(folder))


def check_tokenizer(folder: Path) -> tuple[str, ...]:
    """Notes on the tokenizer for a client. The folder may have none: then the client works with token ids.

    Raises:
        ConfigError: the tokenizer does not belong to the model.
    """
    if not has_tokenizer(folder):
        return ()
    return (*stop_conditions_of(folder).notes, *check_tokens(folder, load_tokenizer(folder)))


def check_files(folder: Path) -> None:
    """Check the configuration and the headers of the weight files.

    Raises:
        ConfigError: a file is missing or damaged, the weights are quantised, or the model needs code in the folder.
    """
    config = read_json(folder / CONFIG)
    if config is None:
        found = next(iter(sorted(folder.glob("*.gguf"))), None)
        if found is not None:
            raise ConfigError(f"model.path: {folder} holds {found.name} and no {CONFIG}. {_about_file(found)}")
        raise ConfigError(f"model.path: {str(folder)!r} has no config.json; wanted config, tokenizer and safetensors")
    if not isinstance(config, dict):
        raise ConfigError(
            f"model.path: {folder}/{CONFIG} holds {type(config).__name__}; wanted an object of names and values"
        )
    _check_config(folder, config)
    stop_tokens_by_place(folder)
    headers = {path.name: _header(path) for path in _weight_files(folder)}
    _check_index(folder, headers)
    _check_tensors(folder, embedding_rows(config), headers)


def check_tokens(folder: Path, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int] = ()) -> list[str]:
    """Compare the tokenizer with the size of the model's embedding, and return notes. `prompt`: token ids of a prompt
    of the job.

    Raises:
        ConfigError: plain text or the job's prompts contain tokens without a row in the embedding.
    """
    rows = embedding_rows(read_json(folder / CONFIG) or {})
    if rows is None or len(tokenizer) <= rows:
        return []
    vocabulary = tokenizer.get_vocab()
    beyond = {id_: text for text, id_ in vocabulary.items() if id_ >= rows}
    words = [text for id_, text in beyond.items() if id_ not in tokenizer.added_tokens_decoder]
    written = [beyond[id_] for id_ in prompt if id_ in beyond]
    if words or written:
        which = f"{len(words)} words such as {words[0]!r}" if words else f"{written[0]!r}, which is in every prompt"
        raise ConfigError(
            f"model.path: {folder}: the tokenizer has {len(tokenizer):,} tokens, but the embedding has {rows:,} rows; "
            f"tokens without a row: {which}. Wanted the tokenizer that belongs to the model, or a model resized to it "
            "(model.resize_token_embeddings(len(tokenizer))) and trained on the new tokens"
        )
    examples = ", ".join(islice(beyond.values(), 3)) + (", ..." if len(beyond) > 3 else "")
    return [
        f"{folder}: the tokenizer has tokens beyond the {rows:,} rows of the embedding ({examples}); the model never "
        "generates them, and problems whose prompts contain one are refused"
    ]


def _endless(folder: Path, endings: StopConditions) -> str:
    named = "; ".join(f"{place} names {list(ids)}, beyond the embedding" for place, ids in endings.by_place.items())
    return (
        f"model.path: {folder}: no stop condition, so every completion would run to rl.sampling.max_tokens: found no "
        f"eos_token_id in generation_config.json and config.json, no eos_token of the tokenizer, and no end of turn in "
        f"a chat template{f' ({named})' if named else ''}; wanted one of them, or rl.sampling.stop: [text, ...], or "
        "rl.sampling.stop: [] if completions should run to the limit"
    )


def _about_file(path: Path) -> str:
    if path.suffix == ".gguf":
        return f"GGUF files cannot be trained, quantised or not; {HOW_FROM_GGUF}"
    return "A model is a folder with config.json, tokenizer files and safetensors"


def _check_config(folder: Path, config: Mapping[str, object]) -> None:
    text_config = config.get("text_config")
    of_text = text_config.get("quantization_config") if isinstance(text_config, Mapping) else None
    quantised = config.get("quantization_config") or of_text
    if quantised:
        method = _method(quantised)
        raise ConfigError(
            f"model.path: {folder}/{CONFIG}: quantization_config says {method}; learner and sampler need weights that "
            "are not quantised. Wanted the checkpoint before quantisation, in bfloat16, float16 or float32; to convert "
            "a quantised one: load it with transformers, model.dequantize(), save_pretrained"
        )
    kind = config.get("model_type")
    if kind in CONFIG_MAPPING_NAMES:
        return  # transformers' class is used, even if auto_map names another one
    if config.get("auto_map"):
        raise ConfigError(
            f"model.path: {folder}/{CONFIG}: model_type {kind!r} needs Python code in the folder (auto_map, "
            "trust_remote_code), which rlsys does not run: learner and sampler need the same implementation, and such "
            "code is not safe. Wanted an architecture that is part of transformers"
        )
    raise ConfigError(
        f"model.path: {folder}/{CONFIG}: found model_type {kind!r}; wanted one that this transformers knows, such as "
        "llama, qwen3, gemma3_text, mistral"
    )


def _method(quantised: object) -> str:
    if not isinstance(quantised, Mapping):
        return repr(quantised)
    bits = next((name for name in ("load_in_4bit", "load_in_8bit") if quantised.get(name)), None)
    method = str(quantised.get("quant_method") or "an unnamed method")
    return f"{method} ({bits})" if bits else method


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files that will be loaded. Raises ConfigError if one is missing."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        shards = sorted(set(_weight_map(folder).values()))
        missing = [name for name in shards if not (folder / name).is_file()]
        if missing:
            examples = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise ConfigError(
                f"model.path: {folder}: {len(missing)} of the {len(shards)} files listed in {INDEX} are missing "
                f"({examples}); copy or download the folder again"
            )
        return [folder / name for name in shards]
    others = sorted(
        path.name for suffix in ("safetensors", "gguf", "bin", "pth", "pt") for path in folder.glob(f"*.{suffix}")
    )
    if any(name.endswith(".gguf") for name in others):
        raise ConfigError(f"model.path: {folder} holds {others[0]}. {_about_file(Path(others[0]))}")
    found = f"found {', '.join(others[:3])}" if others else "found no weights"
    raise ConfigError(
        f"model.path: {folder}: {found}; wanted {WEIGHTS}, or {INDEX} and the files listed in it. Pickled weights "
        "(.bin, .pt) are not loaded because they can run code; convert them once with transformers' save_pretrained"
    )


def _weight_map(folder: Path) -> dict[str, str]:
    index = read_json(folder / INDEX)
    found = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(found, dict) or not found:
        raise ConfigError(f"model.path: {folder}/{INDEX} has no weight_map; copy or download the file again")
    return {str(name): str(file) for name, file in found.items()}


def _header(path: Path) -> Header:
    """Header of a safetensors file, after checking the file's length.

    Raises:
        ConfigError: it is not a safetensors file, or a part of it is missing.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise ConfigError(
                f"model.path: {path} is a Git LFS pointer instead of the weights; run "
                f"`{command('git', '-C', path.parent, 'lfs', 'pull')}`"
            )
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= LARGEST_HEADER:
            raise ConfigError(
                f"model.path: {path} is not a safetensors file ({size:,} bytes); copy or download it again"
            )
        try:
            header = json.loads(file.read(length))
            tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
            end = max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError):
            raise ConfigError(
                f"model.path: {path}: the header is damaged or truncated ({size:,} bytes); copy or download it again"
            ) from None
    if size != 8 + length + end:
        raise ConfigError(
            f"model.path: {path} has {size:,} bytes, but its header describes {8 + length + end:,}: the copy or "
            "download was incomplete; repeat it"
        )
    return tensors


def _check_index(folder: Path, headers: Mapping[str, Header]) -> None:
    """Check that every tensor is in the file that the index names."""
    if WEIGHTS in headers:
        return
    lost = [(name, file) for name, file in _weight_map(folder).items() if name not in headers[file]]
    if lost:
        name, file = lost[0]
        raise ConfigError(
            f"model.path: {folder}: {INDEX} lists {len(lost)} tensors that are not in their file, such as {name} in "
            f"{file}; the files belong to different checkpoints: copy or download the folder again"
        )


def _check_tensors(folder: Path, rows: int | None, headers: Mapping[str, Header]) -> None:
    """Check dtypes, and that the embedding has `rows` rows (None: config.json does not say)."""
    for file, name, entry in _tensors(headers):
        shape, dtype = entry["shape"], entry["dtype"]
        if len(shape) >= 2 and dtype not in PLAIN_DTYPES:
            raise ConfigError(
                f"model.path: {folder}/{file}: {name} is {dtype}; wanted F32, F16 or BF16: quantised weights cannot be "
                "trained, use the checkpoint before quantisation"
            )
        if rows is not None and name.endswith(EMBEDDINGS) and len(shape) == 2 and shape[0] != rows:
            raise ConfigError(
                f"model.path: {folder}: {name} in {file} has {shape[0]:,} rows, but {CONFIG} says vocab_size "
                f"{rows:,}: the files belong to different models, or the model was resized without its configuration "
                f"(then set vocab_size to {shape[0]})"
            )


def _tensors(headers: Mapping[str, Header]) -> Iterator[tuple[str, str, TensorEntry]]:
    for file, header in headers.items():
        for name, entry in header.items():
            yield file, name, entry
