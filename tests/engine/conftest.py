"""One real engine per session, on a random Qwen3 with tied embeddings."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
import torch

from rlsys.config import ModelSection
from rlsys.sampler.engine import Sampler, prepare_environment
from tests.engine.tiny_engine import EOS, MAX_LENGTH, SECTION, VOCAB, Reference

prepare_environment(SECTION)


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        initializer_range=0.08,
        eos_token_id=EOS,
        pad_token_id=0,
        bos_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1", pad_token="w0").save_pretrained(folder)
    return Reference(folder)


@pytest.fixture(scope="session")
def run() -> Iterator[Callable[[Coroutine[Any, Any, Any]], Any]]:
    """Run a coroutine on the session's event loop."""
    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture(scope="session")
def engine(reference: Reference, run: Callable[..., Any]) -> Iterator[Sampler]:
    model = ModelSection(path=str(reference.folder), max_length=MAX_LENGTH)
    sampler = Sampler(name="sampler-0", base=reference.folder, model=model, section=SECTION, seed=5)
    run(sampler.start())
    yield sampler
    run(sampler.stop())


@pytest.fixture
def sampler(engine: Sampler, run: Callable[..., Any]) -> Iterator[Sampler]:
    """The session's engine with no adapter loaded."""
    yield engine
    for key in engine.stats().live:
        run(engine.unload(*key))
