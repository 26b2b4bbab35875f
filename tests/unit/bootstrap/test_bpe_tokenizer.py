"""Claims about the tokenizer that is made from a task's texts."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config

from rlsys.bootstrap.bpe_tokenizer import UNKNOWN, build_tokenizer
from rlsys.errors import ConfigError

TEXTS = [
    f"{name} has {a} books, buys {b} more. How many books does {name} have?\n{a}+{b}={a + b}\n\\boxed{{{a + b}}}"
    for name in ("Ada", "Tom")
    for a in range(1, 21)
    for b in range(1, 10)
]
TOKENIZER = build_tokenizer(TEXTS, 200)


def ids_of(text: str, tokenizer: PreTrainedTokenizerFast = TOKENIZER) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from([*map(chr, range(0x20, 0x7F)), "\n"])))
def test_any_printable_ascii_round_trips(text: str) -> None:
    assert TOKENIZER.decode(ids_of(text)) == text


def test_the_same_texts_give_the_same_tokenizer() -> None:
    again = build_tokenizer(TEXTS, 200)
    assert again.backend_tokenizer.to_str() == TOKENIZER.backend_tokenizer.to_str()


def test_digits_operators_braces_newlines_and_boxed_stand_alone() -> None:
    pieces = [TOKENIZER.decode([i]) for i in ids_of("12+34=46\n\\boxed{46}")]
    assert pieces == ["1", "2", "+", "3", "4", "=", "4", "6", "\n", "\\boxed{", "4", "6", "}"]


def test_a_phrase_with_spaces_becomes_one_token() -> None:
    assert len(ids_of(" more. How many books does ")) <= 3


@given(st.sampled_from(TEXTS))
@settings(max_examples=50, deadline=None)
def test_a_text_cut_after_a_newline_has_the_ids_of_its_parts(text: str) -> None:
    cut = text.index("\n") + 1
    assert ids_of(text[:cut]) + ids_of(text[cut:]) == ids_of(text)


def test_an_unknown_character_stays_visible_one_for_one() -> None:
    shown = TOKENIZER.decode(ids_of("3 日本\t€"), skip_special_tokens=True)
    assert shown == f"3 {UNKNOWN * 4}"


def test_characters_of_the_texts_are_known_characters() -> None:
    tokenizer = build_tokenizer(["Łukasz has 3 żaby\n"], 128)
    assert tokenizer.decode(ids_of("żaby Łukasza", tokenizer)) == "żaby Łukasza"


def test_eos_and_pad_are_distinct_single_tokens_that_decoding_can_hide() -> None:
    assert TOKENIZER.eos_token_id != TOKENIZER.pad_token_id
    assert TOKENIZER.decode([*ids_of("7"), TOKENIZER.eos_token_id], skip_special_tokens=True) == "7"


def test_the_vocabulary_is_at_most_what_was_asked() -> None:
    assert max(ids_of("".join(TEXTS))) < len(TOKENIZER) <= 200


def test_a_vocabulary_below_the_alphabet_is_refused_with_the_number_needed() -> None:
    with pytest.raises(ConfigError, match=r"found 128; wanted at least 199"):
        build_tokenizer(["".join(map(chr, range(0x4E00, 0x4E00 + 100)))], 128)


def test_a_folder_beside_a_qwen3_config_loads_with_the_same_ids(tmp_path: Path) -> None:
    Qwen3Config(vocab_size=len(TOKENIZER)).save_pretrained(tmp_path)  # AutoTokenizer picks its class by the model type
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "".join(TEXTS) + "".join(map(chr, range(0x20, 0x7F)))
    assert ids_of(text, loaded) == ids_of(text)
    assert loaded.decode(ids_of(text)) == text
    assert loaded.eos_token_id == TOKENIZER.eos_token_id
