"""A base with a tokenizer of words and a chat template."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from tests.unit.serve.learner_backend import VOCAB, LearnerBackend
from tests.unit.tiny_learner import Models

CHAT = "{% for message in messages %}{{ message.role }} {{ message.content }} {% endfor %}w9"


@pytest.fixture(scope="package")
def text_backend(tiny_model: Models, tmp_path_factory: pytest.TempPathFactory) -> LearnerBackend:
    folder = tmp_path_factory.mktemp("text") / "base"
    shutil.copytree(tiny_model(True), folder)
    names = ["user", "assistant", "<end>", *(f"w{i}" for i in range(3, VOCAB))]
    words = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="w3"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return LearnerBackend(folder, tmp_path_factory.mktemp("unused"))


@pytest.fixture
def backend(text_backend: LearnerBackend) -> Iterator[LearnerBackend]:
    for record in (text_backend.dropped, text_backend.released, text_backend.done):
        record.clear()
    text_backend.pause_s, text_backend.fails_at = 0.0, None
    yield text_backend
    text_backend.open.set()
