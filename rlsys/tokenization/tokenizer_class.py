"""Chooses the class of a model's tokenizer as AutoTokenizer does, without importing torch.

AutoTokenizer chooses by tokenizer_config.json and by tables per model type. The module with these tables imports torch
and the model classes: 4 s and 350 MiB in a process that only encodes and decodes. The rows of the supported families
are repeated here; tests/unit/tokenization/test_tokenizer_class.py compares each row with AutoTokenizer. For every other
folder the answer is None, and the caller asks AutoTokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

GENERIC = "TokenizersBackend"  # takes everything from tokenizer.json
# Names of the generic class in tokenizer_config.json, without the suffix "Fast".
GENERIC_NAMES = frozenset({GENERIC, "PreTrainedTokenizer"})
# Classes that tokenizer_config.json may name, beside the generic one.
CLASSES = frozenset({"CohereTokenizer", "GPT2Tokenizer", "GemmaTokenizer", "LlamaTokenizer", "Qwen2Tokenizer"})
# Model types whose tokenizer_config.json names the right class.
NAMED = frozenset({"cohere2", "exaone4", "gpt_oss", "llama", "qwen3", "qwen3_moe", "smollm3"}) | {
    "gemma", "gemma2", "gemma3", "gemma3_text"
}  # fmt: skip
# Model types that always have one class, whatever tokenizer_config.json names.
FIXED = {"glm4": GENERIC, "granite": GENERIC, "olmo2": GENERIC, "phi3": GENERIC, "qwen2": "Qwen2Tokenizer"}
# Owners on the Hugging Face hub of models that AutoTokenizer knows by name; a relative folder may have such a name.
OWNERS_KNOWN_BY_NAME = frozenset({"allenai", "deepseek-ai", "google", "naver-clova-ix", "salesforce", "stepfun-ai"})


def tokenizer_class(folder: Path) -> str | None:
    """Return the name of the class in transformers; None: only AutoTokenizer knows it."""
    config, tokenizer_config = (_read(folder / name) for name in ("config.json", "tokenizer_config.json"))
    known_by_name = bool(folder.parts) and folder.parts[0].lower() in OWNERS_KNOWN_BY_NAME
    if known_by_name or not (folder / "tokenizer.json").is_file():
        return None
    if "auto_map" in config or "auto_map" in tokenizer_config or "model_name" in config:
        return None
    model_type, named = config.get("model_type"), tokenizer_config.get("tokenizer_class")
    if not isinstance(model_type, str) or not isinstance(named, str):
        return None
    named = named.removesuffix("Fast")
    if named not in GENERIC_NAMES | CLASSES:
        return None
    if model_type in FIXED:
        return FIXED[model_type]
    if model_type not in NAMED:
        return None
    return GENERIC if named in GENERIC_NAMES else named


def _read(path: Path) -> Mapping[str, Any]:
    """An object of a JSON file; empty if there is none: AutoTokenizer then reports what is wrong."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
