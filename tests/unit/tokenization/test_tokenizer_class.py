"""Claims about the class of a tokenizer: it is AutoTokenizer's, chosen without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import MODEL_IDS_TO_TOKENIZERS_BACKEND

from rlsys.architectures.families import FAMILIES
from rlsys.bootstrap.bpe_tokenizer import build_tokenizer
from rlsys.config import MakeSection
from rlsys.modeling.base_model import initial_model
from rlsys.tokenization.stop_conditions import load_tokenizer
from rlsys.tokenization.tokenizer_class import (
    CLASSES,
    FIXED,
    GENERIC_NAMES,
    NAMED,
    OWNERS_KNOWN_BY_NAME,
    tokenizer_class,
)
from tests.unit.tokenization.test_renderer import CHATML, tokenizer_of

NAMES = sorted({name + suffix for name in GENERIC_NAMES | CLASSES for suffix in ("", "Fast")})
TEXTS = ["Ann has 5 books,\n\nbuys 3.", " \t\u4e2d\u6587 \U0001f600 <|im_start|>x<|im_end|>", "<s></s>\\boxed{8}"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tokenizer_of(CHATML).save_pretrained(folder)
    return folder


def model(at: Path, saved: Path, config: dict[str, Any], **fields: Any) -> Path:
    """A copy of a tokenizer beside a config.json; `fields` replace those of tokenizer_config.json."""
    at.mkdir(parents=True)
    for file in saved.iterdir():
        (at / file.name).write_bytes(file.read_bytes())
    kept = json.loads((at / "tokenizer_config.json").read_text()) | fields
    (at / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in kept.items() if v is not None}))
    (at / "config.json").write_text(json.dumps(config))
    return at


def state(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Everything that decides which ids a text gets, and back."""
    backend = tokenizer.backend_tokenizer
    return {
        "class": type(tokenizer),
        "backend": backend.to_str(),
        "specials": tokenizer.special_tokens_map,
        "added": {id_: repr(token) for id_, token in tokenizer.added_tokens_decoder.items()},
        "template": tokenizer.chat_template,
        "options": (tokenizer.name_or_path, tokenizer.model_max_length, tokenizer.padding_side),
        "size": len(tokenizer),
        "ids": [tokenizer(text)["input_ids"] for text in TEXTS],
        "texts": [tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) for text in TEXTS],
    }


def outcome(load: Any, folder: Path) -> Any:
    try:
        return state(load(folder, trust_remote_code=False))
    except Exception as error:  # some classes refuse the vocabulary
        return type(error), str(error)


@pytest.mark.parametrize("model_type", sorted(NAMED | FIXED.keys()))
def test_every_row_of_the_table_gives_the_tokenizer_that_autotokenizer_gives(
    model_type: str, saved: Path, tmp_path: Path
) -> None:
    for name in NAMES:
        folder = model(tmp_path / name, saved, {"model_type": model_type}, tokenizer_class=name)
        chosen = tokenizer_class(folder)
        assert chosen is not None
        light = outcome(getattr(transformers, chosen).from_pretrained, folder)
        assert light == outcome(AutoTokenizer.from_pretrained, folder), name


def test_every_supported_family_has_a_row_but_mistral_which_depends_on_an_installed_package() -> None:
    assert set(FAMILIES) - NAMED - FIXED.keys() == {"mistral"}


def test_owners_of_models_that_autotokenizer_knows_by_name_are_left_to_it() -> None:
    assert {pattern.partition("/")[0] for pattern in MODEL_IDS_TO_TOKENIZERS_BACKEND} == OWNERS_KNOWN_BY_NAME
    assert not any(pattern.startswith("*") for pattern in MODEL_IDS_TO_TOKENIZERS_BACKEND)


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        ({}, {}),  # no model type
        ({"model_type": "mistral"}, {}),
        ({"model_type": "none_of_transformers"}, {}),
        ({"model_type": "llama"}, {"tokenizer_class": None}),
        ({"model_type": "llama"}, {"tokenizer_class": "BertTokenizer"}),  # no class of the table
        ({"model_type": "llama"}, {"auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}}),
        ({"model_type": "llama", "auto_map": {"AutoConfig": "code.Config"}}, {}),
        ({"model_type": "llama", "model_name": "qwen2"}, {}),
    ],
)
def test_a_folder_that_the_table_does_not_decide_is_left_to_autotokenizer(
    config: dict[str, Any], fields: dict[str, Any], saved: Path, tmp_path: Path
) -> None:
    assert tokenizer_class(model(tmp_path / "model", saved, config, **fields)) is None


def test_a_folder_without_tokenizer_json_or_with_damaged_files_is_left_to_autotokenizer(
    saved: Path, tmp_path: Path
) -> None:
    slow = model(tmp_path / "slow", saved, {"model_type": "llama"})
    (slow / "tokenizer.json").unlink()
    damaged = model(tmp_path / "damaged", saved, {"model_type": "llama"})
    (damaged / "tokenizer_config.json").write_text("{")
    assert tokenizer_class(slow) is None and tokenizer_class(damaged) is None


def test_a_relative_folder_named_as_a_model_that_autotokenizer_knows_is_left_to_it(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = Path("deepseek-ai/DeepSeek-R1-Distill-Llama-8B")
    model(tmp_path / named, saved, {"model_type": "llama"}, tokenizer_class="LlamaTokenizerFast")
    monkeypatch.chdir(tmp_path)
    assert tokenizer_class(named) is None and tokenizer_class(named.absolute()) == "LlamaTokenizer"
    assert type(AutoTokenizer.from_pretrained(named)).__name__ == "TokenizersBackend"


def test_a_base_trained_from_scratch_and_a_fallback_load_as_with_autotokenizer(saved: Path, tmp_path: Path) -> None:
    shape = MakeSection(
        vocab_size=160, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=32, intermediate_size=24
    )
    initial_model(shape, build_tokenizer(["1+1=2\n"], 160), 64, 0, tmp_path / "base")
    assert tokenizer_class(tmp_path / "base") is not None
    unknown = model(tmp_path / "unknown", saved, {})
    for folder in (tmp_path / "base", unknown):
        assert state(load_tokenizer(folder)) == state(AutoTokenizer.from_pretrained(folder))


def test_a_tokenizer_of_the_table_loads_encodes_and_renders_without_torch(saved: Path, tmp_path: Path) -> None:
    folder = model(tmp_path / "model", saved, {"model_type": "qwen3"})
    script = (
        "import sys; from pathlib import Path; from rlsys.config import PromptSection\n"
        "from rlsys.tokenization.renderer import Renderer\n"
        "from rlsys.tokenization.stop_conditions import load_tokenizer, stop_conditions_of\n"
        "folder = Path(sys.argv[1]); tokenizer = load_tokenizer(folder); stop_conditions_of(folder)\n"
        "ids = Renderer(tokenizer, PromptSection()).ids('<|im_end|>?'); tokenizer.batch_decode([ids])\n"
        "print([name for name in ('torch', 'vllm') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
