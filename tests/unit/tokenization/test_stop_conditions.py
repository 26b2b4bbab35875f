"""Claims about which tokens end a completion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlsys.errors import ConfigError, SamplingError
from rlsys.sampler.requests import BaseModel, engine_params, stop_rules
from rlsys.tokenization.stop_conditions import stop_conditions_of, stop_conditions_of_tokenizer
from rlsys.types import SamplingParams
from tests.unit.tokenization.test_renderer import CHATML, END, tokenizer_of

START, SEP = 258, 259  # ids of <|im_start|> and <|sep|>
ROWS = 300
# The last message ends in another token than those of the history, as gpt-oss has it.
RETURNING = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{{ '<|sep|>' if loop.last and not add_generation_prompt else '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def folder_of(
    at: Path,
    config: Any = None,
    generation: Any = None,
    eos: str | None = "<|im_end|>",
    template: str | None = CHATML,
    tokenizer: bool = True,
) -> Path:
    at.mkdir()
    for name, ends in (("config.json", config), ("generation_config.json", generation)):
        fields = {"vocab_size": ROWS, "max_position_embeddings": 64} if name == "config.json" else {}
        (at / name).write_text(json.dumps(fields if ends is None else {**fields, "eos_token_id": ends}))
    if tokenizer:
        made = tokenizer_of(template)
        made.eos_token = eos
        made.save_pretrained(at)
    return at


@pytest.mark.parametrize(
    ("places", "ids", "noted"),
    [
        ({"config": END, "generation": END}, {END}, False),
        ({"config": [END, SEP]}, {END, SEP}, False),
        ({"config": END, "generation": [SEP, END]}, {END, SEP}, False),
        ({"config": SEP}, {SEP, END}, True),  # a base's config beside a chat tokenizer
        ({}, {END}, True),  # a config that names none
        ({"config": SEP, "eos": "<|sep|>"}, {SEP, END}, True),  # only the chat template ends a turn
        ({"config": SEP, "eos": "<|sep|>", "template": None}, {SEP}, False),
        ({"config": END, "template": RETURNING}, {END, SEP}, True),
        ({"config": END, "tokenizer": False}, {END}, False),
        ({"tokenizer": False}, set(), False),
    ],
)
def test_every_place_that_names_an_end_counts(
    tmp_path: Path, places: dict[str, Any], ids: set[int], noted: bool
) -> None:
    found = stop_conditions_of(folder_of(tmp_path / "model", **places))
    assert set(found.ids) == ids and len(found.ids) == len(ids)
    assert bool(found.notes) == noted, found.notes


def test_a_disagreement_is_told_with_tokens_and_places(tmp_path: Path) -> None:
    (note,) = stop_conditions_of(folder_of(tmp_path / "model", config=SEP)).notes
    assert "completions also end with <|im_end|> (257) of the tokenizer and the chat template" in note
    assert "the configuration names <|sep|> (259)" in note


def test_an_end_that_the_tokenizer_takes_for_a_word_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"config\.json: eos_token_id 33 is '.' in the tokenizer.*<\|im_end\|>' \(257\)"
    ):
        stop_conditions_of(folder_of(tmp_path / "model", config=33))


def test_an_end_beyond_the_embedding_ends_nothing_and_is_told(tmp_path: Path) -> None:
    found = stop_conditions_of(folder_of(tmp_path / "model", config=[END, ROWS]))
    assert found.ids == (END,)
    assert "the end token 300 is outside of the embedding" in found.notes[0]


NO_IDS = [
    True,
    False,
    2.0,
    float("nan"),
    "2",
    "</s>",
    -1,
    [END, None],
    [END, -1],
    [END, True],
    [[END]],
    {"id": END},
    "",
]


@pytest.mark.parametrize("ends", NO_IDS, ids=json.dumps)
@pytest.mark.parametrize("place", ["config", "generation"])
def test_an_end_that_is_no_token_id_is_refused_by_file_and_key(tmp_path: Path, place: str, ends: Any) -> None:
    folder, file = tmp_path / "model", "config.json" if place == "config" else "generation_config.json"
    with pytest.raises(ConfigError) as error:
        stop_conditions_of(folder_of(folder, **{"config": END, place: ends}))
    assert f"{folder}/{file}: eos_token_id is {json.dumps(ends)}; wanted a token id such as 2" in str(error.value)


@pytest.mark.parametrize("text", [{"eos_token_id": True}, {"eos_token_id": ["x"]}, [], "gemma"], ids=json.dumps)
def test_an_end_of_the_text_part_is_judged_alike(tmp_path: Path, text: Any) -> None:
    folder = folder_of(tmp_path / "model")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "text_config": text}))
    if text:
        with pytest.raises(ConfigError, match=r"config\.json: text_config(\.eos_token_id)? is .*; wanted"):
            stop_conditions_of(folder)
    else:  # as good as none
        assert stop_conditions_of(folder).ids == (END,)


DAMAGED = {
    "empty": (b"", "is not valid JSON"),
    "cut off": (b'{"eos_token_id": 2', "is not valid JSON"),
    "a pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\n", "is not valid JSON"),
    "an error page": (b"<html>404</html>", "is not valid JSON"),
    "no UTF-8": (b'{"eos_token_id": "\xff"}', "is not valid JSON"),
    "a list": (b"[2]", "holds list; wanted a JSON object"),
    "a number": (b"2", "holds int; wanted a JSON object"),
    "two values": (b'{"eos_token_id": 257, "eos_token_id": 259}', "'eos_token_id' is given twice"),
}


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_damaged_configuration_is_refused_by_its_name(tmp_path: Path, name: str, damage: str) -> None:
    content, said = DAMAGED[damage]
    folder = folder_of(tmp_path / "model", config=END)
    (folder / name).write_bytes(content)
    with pytest.raises(ConfigError) as error:
        stop_conditions_of(folder)
    assert f"model.path: {folder / name}" in str(error.value) and said in str(error.value)


def test_a_folder_in_place_of_a_configuration_is_refused_by_its_name(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", config=END)
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").mkdir()
    with pytest.raises(ConfigError, match=r"generation_config\.json cannot be read: Is a directory"):
        stop_conditions_of(folder)


LACKING = 280  # a row of the embedding, no token of the tokenizer, as in vocabularies that are padded


@pytest.mark.parametrize(
    ("places", "ids"),
    [
        ({"config": [END, END, SEP, END]}, (END, SEP)),
        ({"config": END, "generation": [END]}, (END,)),
        ({"config": []}, (END,)),
        ({"config": [SEP], "generation": []}, (SEP, END)),
        ({"config": LACKING}, (LACKING, END)),
        ({"config": [END, 10**30]}, (END,)),
        ({"config": ROWS - 1, "tokenizer": False}, (ROWS - 1,)),
        ({"config": [ROWS], "tokenizer": False}, ()),
    ],
)
def test_every_list_of_ids_works(tmp_path: Path, places: dict[str, Any], ids: tuple[int, ...]) -> None:
    assert stop_conditions_of(folder_of(tmp_path / "model", **places)).ids == ids


def test_a_folder_without_generation_config_ends_as_the_others_say(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", config=SEP)
    (folder / "generation_config.json").unlink()
    assert set(stop_conditions_of(folder).ids) == {SEP, END}
    (folder / "generation_config.json").write_text("null")
    assert set(stop_conditions_of(folder).ids) == {SEP, END}


def test_a_base_that_is_made_ends_with_its_tokenizers_end() -> None:
    assert stop_conditions_of_tokenizer(tokenizer_of(None)).ids == (END,)


@pytest.mark.parametrize(
    ("stop", "also", "texts", "ids"),
    [
        (None, (), [], [END]),
        ([], (), [], []),
        ([7, 8], (), [], [7, 8]),
        ("x;", (), ["x;"], [END]),
        (["x;", "y"], (), ["x;", "y"], [END]),
        (["<|im_end|>"], (), [], [END]),
        (["<|sep|>", "x;"], (), ["x;"], [END, SEP]),
        (None, ("x;", "<|sep|>"), ["x;"], [END, SEP]),
        ([7], ("x;",), ["x;"], [7]),
        (["x;"], ("y",), ["x;", "y"], [END]),
    ],
)
def test_stop_strings_add_to_the_ends_and_ids_replace_them(
    tmp_path: Path, stop: Any, also: tuple[str, ...], texts: list[str], ids: list[int]
) -> None:
    model = BaseModel(folder_of(tmp_path / "model", config=END))
    assert stop_rules(stop, model, also) == (texts, ids)
    made = engine_params(SamplingParams(max_tokens=4, stop=stop), 1, 0, model, also)
    assert (made.stop, made.stop_token_ids, made.ignore_eos) == (texts, ids, True)


def test_a_stop_string_that_no_text_can_show_is_refused(tmp_path: Path) -> None:
    model = BaseModel(folder_of(tmp_path / "model", config=END))
    with pytest.raises(
        SamplingError,
        match=r"stop: found '<\|im_end\|>\\n'; the special token '<\|im_end\|>' never occurs in decoded text",
    ):
        stop_rules(["<|im_end|>\n"], model)
