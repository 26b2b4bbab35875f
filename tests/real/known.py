"""The real tokenizers, where they are, and what their models' configurations name as ends."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from examples.real_model import FOLDER as SMOLLM2
from examples.real_tokenizers import FOLDER

logging.set_verbosity_error()
HARMONY = Path(__file__).with_name("harmony.jinja")


@dataclass(frozen=True, slots=True)
class Known:
    model: str  # whose config.json and generation_config.json these ends are
    config: int | list[int]
    generation: int | list[int]
    rows: int  # of the embedding
    thinking_off: dict[str, Any]
    said: str = ""  # what the model writes before a text of its own
    folder: Path | None = None  # None: in .tokenizers


KNOWN = {
    "qwen3": Known("Qwen/Qwen3-0.6B", 151645, [151645, 151643], 151936, {"enable_thinking": False}),
    "llama3_1": Known(
        "meta-llama/Llama-3.1-8B-Instruct", [128001, 128008, 128009], [128001, 128008, 128009], 128256, {}
    ),
    "gemma3": Known("google/gemma-3-1b-it", [1, 106], [1, 106], 262144, {}),
    "gptoss": Known(
        "openai/gpt-oss-20b",
        200002,
        [200002, 199999, 200012],
        201088,
        {"reasoning_effort": "low"},
        said="<|channel|>final<|message|>",
    ),
    "smollm2": Known("HuggingFaceTB/SmolLM2-135M-Instruct", 2, 2, 49152, {}, folder=SMOLLM2),
}


def folder_of(name: str) -> Path:
    return KNOWN[name].folder or FOLDER / name


@cache
def load(name: str) -> PreTrainedTokenizerBase:
    """Skips the test that asks, where the tokenizer is not on this machine."""
    folder = folder_of(name)
    if not (folder / "tokenizer.json").is_file():
        target = "make real-model" if name == "smollm2" else "make real-tokenizers"
        pytest.skip(f"no tokenizer of {name} at {folder}; `{target}` brings it")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if name == "gptoss":
        tokenizer.chat_template = HARMONY.read_text(encoding="utf-8")
    return tokenizer


def model_folder(name: str, at: Path) -> Path:
    """The tokenizer's files beside a configuration that names the ends of the model."""
    known = KNOWN[name]
    load(name)
    at.mkdir()
    for file in folder_of(name).iterdir():
        if file.name.startswith(("tokenizer", "chat_template", "special_tokens")):
            os.symlink(file, at / file.name)
    if name == "gptoss":
        (at / "chat_template.jinja").write_text(HARMONY.read_text(encoding="utf-8"), encoding="utf-8")
    (at / "config.json").write_text(json.dumps({"eos_token_id": known.config, "vocab_size": known.rows}))
    (at / "generation_config.json").write_text(json.dumps({"eos_token_id": known.generation}))
    return at
