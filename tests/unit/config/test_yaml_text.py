"""YAML of users: nothing is lost, and a text or a number is what its author wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlsys.architectures.model_shape import read_config
from rlsys.config import dump_config, load_config, parse_config
from rlsys.config.yaml_text import read_json
from rlsys.errors import ConfigError

SMALL = "run: {name: a}\nmodel: {make: {}}\n"

TWICE = [
    # a file, the key that the message names, its line, the line of the first
    ("rl: {steps: 3}\nrl: {substeps: 1}\n", "rl", 4, 3),
    ("rl:\n  optim:\n    learning_rate: 1\n    beta1: 0\n    learning_rate: 2\n", "rl.optim.learning_rate", 7, 5),
    ("run: {seed: 1}\n", "run", 3, 1),
    ('rl: {steps: 3,\n "steps": 4}\n', "rl.steps", 4, 3),
    ("prompt:\n  few_shot:\n  - prompt: a\n    answer: b\n    prompt: c\n", "prompt.few_shot.0.prompt", 7, 5),
    ("task: {options: {deep: {a: 1,\n a: 1}}}\n", "task.options.deep.a", 4, 3),
    ("rl:\n  loss:\n    params: {clip: 0.1,\n     clip: 0.2}\n", "rl.loss.params.clip", 6, 5),
    ("rl: {<<: {steps: 3},\n <<: {substeps: 1}}\n", "rl.<<", 4, 3),
    ("learner: {resources: {1: 2,\n '1': 3}}\n", "learner.resources.1", 4, 3),
]


@pytest.mark.parametrize(("text", "key", "line", "first"), TWICE, ids=[row[1] for row in TWICE])
def test_a_key_given_twice_is_refused_with_both_lines(text: str, key: str, line: int, first: int) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(SMALL + text, source="job.yaml")
    assert str(caught.value).startswith(f"job.yaml: line {line}: {key}: given twice, first in line {first}")


def test_a_merge_gives_what_is_not_given_and_loses_no_key_of_a_section() -> None:
    shared = "rl: {<<: {steps: 3, optim: {beta1: 0.5, eps: 1}}, substeps: 2%s}\n"
    found = parse_config(SMALL + shared % "").rl
    assert (found.steps, found.substeps, found.optim.beta1) == (3, 2, 0.5)
    assert parse_config(SMALL + shared % ", steps: 4").rl.steps == 4
    with pytest.raises(ConfigError, match=r"line 3: rl\.optim: << does not merge inside a section, so beta1, eps"):
        parse_config(SMALL + shared % ", optim: {learning_rate: 1}")


def test_a_section_without_keys_sets_none() -> None:
    assert parse_config(SMALL + "rl:\nlearner:\n  # threads: 2\n") == parse_config(SMALL)
    assert parse_config(SMALL + "rl:\n", ["rl.optim.beta1=0.5"]).rl.optim.beta1 == 0.5


WRONG = [
    ("\tx: 1\n", "line 3, column 1"),
    ("rl: {steps: *s}\n", "line 3, column 13"),
    ("prompt: {template_options: &a {b: *a}}\n", "line 3: prompt.template_options.b: holds itself"),
    ("rl: !!set {steps}\n", "line 3: rl: found the tag"),
    ("rl: {steps: !!int many}\n", "line 3: rl.steps: found 'many'"),
    ("prompt: {template: {prompt}}\n", "line 3: prompt.template: found a list or a mapping"),
    ("? [a]\n: 1\n", "line 3: found a list or a mapping as a key"),
    ("--- {}\n", "line 3"),
    ("x: " + "[" * 5000, "nested too deeply"),
]


@pytest.mark.parametrize(("text", "named"), WRONG, ids=[row[1] for row in WRONG])
def test_what_is_no_job_is_one_line_with_its_place(text: str, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(SMALL + text, source="job.yaml")
    assert named in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"\xff\xfer\x00u\x00", r"line 1: found UTF-16 at byte 1 of the line; wanted UTF-8"),
        (b"run: {name: caf\xe9}", r"line 1: found byte 0xe9 at byte 16 of the line; wanted UTF-8"),
        (b"# caf\xc3\xa9\r\nrun:\n  name: caf\xe9\n", r"line 3: found byte 0xe9 at byte 12 of the line; wanted UTF-8"),
        (b"\x80\n", r"line 1: found byte 0x80 at byte 1 of the line; wanted UTF-8"),
        (
            b"run: {name: a}\nmodel: {make: {}}\n#\xe2\x82",
            r"line 3: found byte 0xe2 at byte 2 of the line; wanted UTF-8",
        ),
    ],
    ids=["UTF-16", "Latin-1", "Latin-1 in line 3", "a continuation byte", "a cut character"],
)
def test_a_file_in_another_encoding_is_refused_with_file_line_and_the_way_out(
    tmp_path: Path, content: bytes, named: str
) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"job\.yaml, {named}: save the file in that encoding"):
        load_config(path)


def test_a_byte_order_mark_is_no_part_of_a_job(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + SMALL.encode())
    assert load_config(path) == parse_config(SMALL)


@pytest.mark.parametrize("text", ["yes", "off", "1e-4", "010", "1:30", "2026-02-03", "0x10", "1_000", ".nan", "=", "3"])
def test_a_text_without_quotes_is_that_text_where_a_text_is_wanted(text: str) -> None:
    found = parse_config(
        f"{SMALL}prompt: {{system: {text}, few_shot: [{{prompt: q, answer: {text}}}]}}\ntracking: {{tags: [{text}]}}\n"
    )
    assert (found.prompt.system, found.prompt.few_shot[0].answer, found.tracking.tags) == (text, text, [text])


@pytest.mark.parametrize("null", ["null", "~", ""])
def test_no_value_stays_none_where_none_is_one(null: str) -> None:
    assert parse_config(f"{SMALL}prompt: {{system: {null}}}\n").prompt.system is None


@pytest.mark.parametrize(
    ("text", "number"), [("1e-4", 1e-4), ("1E3", 1000), ("+.5", 0.5), ("010", 10), ("1_000", 1000), ("0x10", 16)]
)
def test_a_number_is_what_it_looks_like(text: str, number: float) -> None:
    found = parse_config(f"{SMALL}rl: {{optim: {{learning_rate: {text}}}}}\ntask: {{options: {{n: {text}}}}}\n")
    assert found.rl.optim.learning_rate == number
    assert found.task.options["n"] == (number if text != "010" else "010")


@pytest.mark.parametrize("text", ["yes", "1:30", "true", "2026-02-03", "1e-4x"])
def test_what_is_no_number_is_refused_where_one_is_wanted(text: str) -> None:
    with pytest.raises(ConfigError, match=rf"run\.seed: found '{text}'"):
        parse_config(f"run: {{name: a, seed: {text}}}\nmodel: {{make: {{}}}}\n")


OPTIONS: dict[str, Any] = {
    "a": "1e-4", "b": 1e-4, "c": "010", "d": "yes", "e": True, "f": "2026-02-03", "g": None, "h": "null", "i": [1, "1"],
    "j": "a: b # c", "k": "1:30", "l": "0x10", "m": "", "n": "line\nline\n", "o": "<<",
}  # fmt: skip


def test_what_a_run_keeps_reads_to_the_same_values_here_and_by_yaml_1_1() -> None:
    config = parse_config(SMALL, [f"task.options={json.dumps(OPTIONS)}"])
    assert config.task.options == OPTIONS
    assert parse_config(dump_config(config)) == config
    assert yaml.safe_load(dump_config(config))["task"]["options"] == OPTIONS


def test_a_json_name_with_two_values_is_refused(tmp_path: Path) -> None:
    assert read_json('{"a": 1, "b": {"a": 1}, "a": 1}', "x.json") == {"a": 1, "b": {"a": 1}}
    with pytest.raises(ConfigError, match=r"x\.json: 'a' is given twice in one object: 1 and 2"):
        read_json('[{"b": {"a": 1, "a": 2}}]', "x.json")
    (tmp_path / "config.json").write_text('{"model_type": "qwen3", "vocab_size": 8, "vocab_size": 9}')
    with pytest.raises(ConfigError, match=r"^model\.path: .*config\.json: 'vocab_size' is given twice"):
        read_config(tmp_path)
