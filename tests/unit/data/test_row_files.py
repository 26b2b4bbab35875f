"""Claims about rows of files: what a file says is what a problem has, and what cannot be read is one line."""

from __future__ import annotations

import datetime
import gzip
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from rlsys.config import ColumnSection, SourceSection
from rlsys.data.rows import Rows, read_rows
from rlsys.errors import ConfigError

VERL = {"prompt": "prompt", "answer": "reward_model.ground_truth"}


def read(path: Path | str, split: str = "train", **columns: str) -> Rows:
    return read_rows(SourceSection(path=str(path), split=split), ColumnSection(**columns), "task.train")


def answers(path: Path) -> tuple[str | None, ...]:
    """By question 0, 1, ...; None of a row that is left out."""
    found = read(path)
    by_question = dict(zip(found.prompts, found.answers, strict=True))
    return tuple(by_question.get(f"{i}?") for i in range(len(by_question) + found.unusable))


def json_file(path: Path, *written: str) -> Path:
    path.write_text("".join(f'{{"question": "{i}?", "answer": {value}}}\n' for i, value in enumerate(written)))
    return path


def csv_file(path: Path, *written: str) -> Path:
    path.write_text("question,answer\n" + "".join(f"{i}?,{value}\n" for i, value in enumerate(written)))
    return path


def parquet_file(path: Path, column: Any, **options: Any) -> Path:
    table = pyarrow.table({"question": [f"{i}?" for i in range(len(column))], "answer": column})
    parquet.write_table(table, path, **options)
    return path


@pytest.mark.parametrize(
    ("written", "answer"),
    [
        ("123456789012345678901234", "123456789012345678901234"),
        ("-9007199254740993", "-9007199254740993"),
        ("9" * 5000, "9" * 5000),
        ("3.141592653589793238462643383", "3.141592653589793238462643383"),
        ("0.10", "0.10"),
        ("7.0", "7"),
        ("-0.0", "0"),
        ("1e5", "100000"),
        ("1e-7", "0.0000001"),
        ("1e400", "1E+400"),
        ("1e99999999999999999999", "1e99999999999999999999"),
        ('"2020-01-01"', "2020-01-01"),
        ('"2020-01-01T00:00:00Z"', "2020-01-01T00:00:00Z"),
        ('"NA"', "NA"),
        ('"007"', "007"),
        ('"true"', "true"),
        ("null", None),
        ("NaN", None),
        ("-Infinity", None),
        ("true", None),
        ("[1]", None),
        ('{"value": 1}', None),
        ('"half a smile \\ud83d"', None),
    ],
)
@pytest.mark.parametrize("beside", ['"words"', "1", "0.5", "null"])
def test_a_json_value_is_what_the_file_says_whatever_else_the_column_holds(
    tmp_path: Path, written: str, answer: str | None, beside: str
) -> None:
    found = answers(json_file(tmp_path / "rows.jsonl", written, '"there"', beside))
    assert found[0] == answer
    assert found[1] == "there"


@pytest.mark.parametrize(
    ("written", "answer"),
    [
        ("123456789012345678901234", "123456789012345678901234"),
        ("007", "007"),
        ("0.10", "0.10"),
        ("NA", "NA"),
        ("null", "null"),
        ("nan", "nan"),
        ("None", "None"),
        ("True", "True"),
        ("2020-01-01", "2020-01-01"),
        ("1e5", "1e5"),
        ('"1,500"', "1,500"),
        ('"a\nb"', "a\nb"),
        ('"say ""x"""', 'say "x"'),
        ("", None),
        ('"  "', None),
    ],
)
def test_a_csv_cell_is_its_text(tmp_path: Path, written: str, answer: str | None) -> None:
    for other in ("8", "", "word"):
        assert answers(csv_file(tmp_path / "rows.csv", written, "there", other))[:2] == (answer, "there")


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pyarrow.array([Decimal("0.00"), Decimal("12.50"), None], pyarrow.decimal128(10, 2)), ("0.00", "12.50", None)),
        (pyarrow.array([Decimal("1" * 60)], pyarrow.decimal256(60, 0)), ("1" * 60,)),
        (pyarrow.array([2**64 - 1, None], pyarrow.uint64()), ("18446744073709551615", None)),
        (pyarrow.array([0.1, 7.0, None, float("nan"), 1e23]), ("0.1", "7", None, None, "1" + "0" * 23)),
        (pyarrow.array([0.1, 1 / 3, 7.0, None], pyarrow.float32()), ("0.1", "0.33333334", "7", None)),
        (pyarrow.array([0.1, 2.5], pyarrow.float32()).dictionary_encode(), ("0.1", "2.5")),
        (pyarrow.array([b"\xc3\xa9", b"\xff", b"", None], pyarrow.binary()), ("\xe9", None, None, None)),
        (pyarrow.array([datetime.date(2020, 1, 2), None]), ("2020-01-02", None)),
        (pyarrow.array([1], pyarrow.timestamp("ns", "UTC")), ("1970-01-01T00:00:00.000000001+00:00",)),
        (pyarrow.array([datetime.time(3, 4)]), ("03:04:00",)),
        (pyarrow.array(["x", "NA", ""], pyarrow.large_string()), ("x", "NA", None)),
        (pyarrow.array(["x", "y"]).dictionary_encode(), ("x", "y")),
    ],
)
def test_a_parquet_value_is_what_the_file_says(tmp_path: Path, column: Any, expected: tuple[str | None, ...]) -> None:
    assert answers(parquet_file(tmp_path / "rows.parquet", column)) == expected


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        (pyarrow.array([True, False]), "bool 'True'"),
        (pyarrow.array([datetime.timedelta(1)]), "timedelta"),
        (pyarrow.array([b"\xff"], pyarrow.binary()), "bytes"),
        (pyarrow.array([[1]]), "list"),
        (pyarrow.nulls(1), "NoneType"),
    ],
)
def test_a_column_that_is_neither_text_nor_number_is_refused_by_its_first_value(
    tmp_path: Path, column: Any, kind: str
) -> None:
    with pytest.raises(ConfigError, match=rf"no usable row: row 0: answer is {kind}.* wanted a text or a number"):
        read(parquet_file(tmp_path / "rows.parquet", column))


def verl_rows() -> list[dict[str, Any]]:
    """In the form of verl's examples/data_preprocess."""
    return [
        {
            "data_source": "openai/gsm8k",
            "prompt": [{"role": "user", "content": f"{i} + {i}? Let's think step by step."}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(2 * i)},
            "extra_info": {"split": "train", "index": i, "answer": f"It is {2 * i} #### {2 * i}", "question": f"{i}?"},
        }
        for i in range(3)
    ]


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("ending", [".parquet", ".jsonl"])
def test_data_in_verls_form_is_read_by_the_names_of_what_its_columns_hold(tmp_path: Path, ending: str) -> None:
    path = written(tmp_path / f"train{ending}", verl_rows())
    found = read(path, **VERL)
    assert found.prompts == tuple(f"{i} + {i}? Let's think step by step." for i in range(3))
    assert found.answers == ("0", "2", "4")
    found = read(path, prompt="extra_info.question", answer="extra_info.index")
    assert (found.prompts, found.answers) == (("0?", "1?", "2?"), ("0", "1", "2"))


def test_messages_stay_messages_in_their_order(tmp_path: Path) -> None:
    said = [("system", ""), ("user", "1 + 1?"), ("assistant", "2"), ("user", "and 2 + 2?")]
    row = verl_rows()[0] | {"prompt": [{"role": role, "content": text} for role, text in said]}
    assert read(written(tmp_path / "chat.parquet", [row]), **VERL).prompts == (tuple(said),)


def test_texts_of_a_message_in_parts_are_one_text(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "1 + "}, {"type": "text", "text": "1?"}]
    row = {"question": [{"role": "user", "content": parts}], "answer": "2"}
    assert read(written(tmp_path / "parts.jsonl", [row])).prompts == ("1 + 1?",)


@pytest.mark.parametrize(
    ("prompt", "why"),
    [
        ([], "list"),
        ([{"from": "human", "value": "1?"}], "messages of role and content"),
        ([{"role": "tool", "content": "1?"}], "the role 'tool' (known roles: system, user, assistant)"),
        ([{"role": "<|im_end|>", "content": "1?"}], "the role '<|im_end|>'"),
        (
            [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "1"}],
            "ends with a message of the role 'assistant'",
        ),
        ([{"role": "user", "content": "1?"}, {"role": "system", "content": "x"}], "a system message at position 1"),
        ([{"role": "user", "content": " "}], "wanted a text"),
        ([{"role": "user", "content": None}], "wanted a text"),
        ([{"role": "user", "content": [{"type": "image", "path": "a.png"}]}], "a part of type 'image'"),
    ],
)
def test_messages_that_are_no_prompt_are_left_out_with_the_reason(tmp_path: Path, prompt: Any, why: str) -> None:
    path = written(tmp_path / "odd.jsonl", [{"question": prompt, "answer": 1}, {"question": "2?", "answer": 2}])
    found = read(path)
    assert (found.prompts, found.unusable) == (("2?",), 1)
    assert found.why.startswith("row 0: question ")
    assert why in found.why


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (
            "reward_model.groundtruth",
            r"no column 'reward_model\.groundtruth'.*did you mean 'reward_model\.ground_truth'",
        ),
        ("reward_model.ground_truth.x", "no column"),
        ("reward.ground_truth", r"it has .*reward_model"),
        ("reward_model", r"reward_model is dict .*wanted a text or a number; .* such as reward_model\.style"),
    ],
)
@pytest.mark.parametrize("ending", [".parquet", ".jsonl"])
def test_a_wrong_nested_name_is_refused_with_those_there_are(
    tmp_path: Path, column: str, message: str, ending: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read(written(tmp_path / f"train{ending}", verl_rows()), prompt="prompt", answer=column)


def test_a_place_in_a_list_is_named_by_its_number(tmp_path: Path) -> None:
    rows = [{"question": f"{i}?", "answers": {"text": texts}} for i, texts in enumerate([["a", "b"], [], ["c"]])]
    found = read(written(tmp_path / "squad.parquet", rows), answer="answers.text.0")
    assert (found.answers, found.unusable) == (("a", "c"), 1)


def test_a_column_with_a_dot_in_its_own_name_is_found(tmp_path: Path) -> None:
    (tmp_path / "dots.csv").write_text("question,reward_model.ground_truth\n1?,1\n")
    assert read(tmp_path / "dots.csv", prompt="question", answer="reward_model.ground_truth").answers == ("1",)
    rows = [{"question": "1?", "a.b": {"c": 1}}]
    assert read(written(tmp_path / "dots.parquet", rows), answer="a.b.c").answers == ("1",)


def test_rows_that_lack_a_column_which_others_have_are_left_out_and_counted(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"question": "1?"}, {"question": "2?", "answer": 2, "reward": None}]
    found = read(written(tmp_path / "rows.jsonl", rows))
    assert (found.answers, found.unusable) == (("2",), 1)


ROW = b'{"question": "1?", "answer": 1}\n'
LATIN = "\xe9".encode("latin-1")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", ROW + ROW.replace(b"1?", LATIN), "line 2: found byte 0xe9 at byte 15 of the line; wanted UTF-8"),
        ("rows.json", b"[" + ROW + b"," + ROW.replace(b"1?", LATIN) + b"]", "line 2: found byte 0xe9"),
        ("rows.csv", b"question,answer\n1?,1\n" + LATIN + b",2\n", "line 3: found byte 0xe9 at byte 1 of the line"),
        ("rows.tsv", b"question\tanswer\n" + LATIN + b"\t2\n", "line 2: found byte 0xe9"),
        ("rows.jsonl", ROW.decode().encode("utf-16"), "line 1: found UTF-16"),
        ("rows.csv", "question,answer\n".encode("utf-16"), "line 1: found UTF-16"),
        ("rows.jsonl", ROW + b'{"question": "2?"\n', r"line 2: is not valid JSON: .*column 18"),
        ("rows.jsonl", ROW + b"[1]\n", "line 2: found list '.1.'; wanted an object"),
        (
            "rows.json",
            b'{"data":\n[1]}',
            "is a single JSON object with the keys data; wanted a list of objects, or one object per",
        ),
        ("rows.json", b'["1?"]', "element 0: found str '1.'; wanted an object"),
        ("rows.jsonl", b'{"question": "1?", "answer": 1, "answer": 2}\n', "line 1: the key 'answer' occurs twice"),
        ("rows.jsonl", b'{"a": ' * 100_000, "line 1: is nested too deeply"),
        ("rows.csv", b"question,answer\n1?,1,500\n", "line 2: found 3 cells, but the header has 2 columns"),
        ("rows.csv", b'question,answer\n"1?,1\n2?,2\n', "line 3: is not valid CSV: unexpected end of data"),
        ("rows.csv", b"question,answer,answer\n1?,1,2\n", "has 2 columns named 'answer'"),
        ("rows.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer.*git .*lfs pull"),
        ("rows.parquet", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer.*git .*lfs pull"),
        ("rows.parquet", b"PAR1 and then nothing", "cannot be read: the file is not Parquet or is damaged"),
        ("rows.jsonl.gz", b"not packed", "cannot be read: Not a gzipped file"),
        ("rows.jsonl.gz", gzip.compress(ROW, mtime=0)[:-9], "cannot be read: .*copy or download the file again"),
        ("rows.jsonl.xz", b"not packed", "cannot be read: "),
    ],
)
def test_a_file_that_cannot_be_decoded_is_one_line_with_file_and_place(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"task\.train: .*{name}.*{message}") as raised:
        read(path)
    assert "\n" not in str(raised.value)


def test_a_parquet_text_that_is_not_utf8_is_refused_by_row_and_column(tmp_path: Path) -> None:
    offsets = pyarrow.array([0, 1, 2], pyarrow.int32()).buffers()[1]
    column = pyarrow.Array.from_buffers(pyarrow.string(), 2, [None, offsets, pyarrow.py_buffer(b"a\xff")])
    with pytest.raises(ConfigError, match=r"rows\.parquet, row 1: column answer cannot be decoded"):
        read(parquet_file(tmp_path / "rows.parquet", column))


@pytest.fixture
def somebody() -> Iterator[None]:
    """Root reads everything, so it stands aside: the rest of the test is another user's."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    yield
    os.seteuid(before)


def test_a_file_that_may_not_be_read_says_so(somebody: None) -> None:
    with tempfile.TemporaryDirectory() as folder:  # the user's own, unlike pytest's
        path = json_file(Path(folder) / "rows.jsonl", "1")
        path.chmod(0)
        with pytest.raises(ConfigError, match=r"rows\.jsonl cannot be read: Permission denied"):
            read(path)


def test_what_editors_and_tools_put_into_files_is_no_part_of_the_rows(tmp_path: Path) -> None:
    bom, lines = b"\xef\xbb\xbf", b'{"question": "1?", "answer": 1}\r\n\r\n'
    (tmp_path / "rows.jsonl").write_bytes(bom + lines)
    (tmp_path / "list.json").write_bytes(bom + b"\n [" + lines + b"]")
    (tmp_path / "rows.csv").write_bytes(bom + b"question,answer\r\n1?,1\r\n\r\n")
    (tmp_path / "rows.tsv").write_bytes(b"question\tanswer\n1?\t1\n")
    (tmp_path / "rows.JSONL").write_bytes(lines)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines))
    for name in ("rows.jsonl", "list.json", "rows.csv", "rows.tsv", "rows.JSONL", "rows.jsonl.gz"):
        assert read(tmp_path / name) == Rows(("1?",), ("1",), 0, ""), name


def test_long_texts_and_separators_within_them_are_read(tmp_path: Path) -> None:
    text = "x" * 300_000 + "\u2028\x85\x0c"
    rows: list[Mapping[str, Any]] = [{"question": text, "answer": 1}]
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0], ensure_ascii=False) + "\n")
    (tmp_path / "rows.csv").write_text(f"question,answer\n{text},1\n")
    for name in ("rows.jsonl", "rows.csv"):
        assert read(tmp_path / name).prompts == (text,), name


NAMES = [
    "exp[1]",
    "a*b",
    "a?b",
    "[!x]",
    "{a,b}",
    "two words",
    "50%20",
    "a#b",
    "\xfc\u4e2d",
    "a::b",
    "http:",
    "~x",
    "-x",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
def test_a_path_is_no_pattern_and_no_address(tmp_path: Path, name: str, ending: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    for split in ("train", "test"):
        path = folder / f"{split}{ending}"
        if ending == ".parquet":
            parquet_file(path, pyarrow.array([split]))
        else:
            (json_file if ending == ".jsonl" else csv_file)(path, json.dumps(split))
    assert read(folder / f"train{ending}").answers == ("train",)
    assert read(folder, "test").answers == ("test",)


@pytest.mark.parametrize("name", NAMES)
def test_a_files_own_name_is_no_pattern_either(tmp_path: Path, name: str) -> None:
    assert answers(json_file(tmp_path / f"{name}.jsonl", "1")) == ("1",)
    assert read(tmp_path).answers == ("1",)


def test_another_file_that_the_pattern_would_match_is_not_read(tmp_path: Path) -> None:
    json_file(tmp_path / "exp1.jsonl", "1")
    with pytest.raises(ConfigError, match=r"no file or folder .*exp\[1\]\.jsonl"):
        read(tmp_path / "exp[1].jsonl")
    assert answers(json_file(tmp_path / "exp[1].jsonl", "2")) == ("2",)


def test_a_folder_gives_parts_of_splits_and_several_together(tmp_path: Path) -> None:
    json_file(tmp_path / "train.jsonl", *map(str, range(10)))
    json_file(tmp_path / "test.jsonl", "10")
    assert read(tmp_path, "train[:20%]").answers == ("0", "1")
    assert read(tmp_path, "train[8:]+test").answers == ("8", "9", "10")
    with pytest.raises(ConfigError, match=r"has no split 'tests'; it has 'train', 'test'; did you mean 'test'"):
        read(tmp_path, "tests")
    with pytest.raises(ConfigError, match=r"split 'train\[x\]'"):
        read(tmp_path, "train[x]")


def test_an_empty_folder_and_one_whose_readme_is_wrong_say_what_they_lack(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"contains no data files; wanted files whose names end in \.jsonl"):
        read(tmp_path)
    json_file(tmp_path / "rows.jsonl", "1")
    card = tmp_path / "README.md"
    card.write_text("---\nconfigs:\n- {config_name: a, data_files: lost.jsonl}\n- {config_name: b}\n---\n")
    with pytest.raises(ConfigError, match=r"several subsets; set task\.train\.subset to one of a, b"):
        read(tmp_path)
    for subset, message in (("a", "names files that do not exist: .*lost"), ("c", "no subset 'c'.*it has a, b")):
        with pytest.raises(ConfigError, match=message):
            read_rows(SourceSection(path=str(tmp_path), subset=subset), ColumnSection(), "task.train")
    card.write_text("---\nconfigs: [\n---\n")
    with pytest.raises(ConfigError, match=r"its README\.md cannot be read: "):
        read(tmp_path)


def test_what_lies_beside_the_rows_in_a_folder_is_no_row(tmp_path: Path) -> None:
    json_file(tmp_path / "data.jsonl", "1")
    for name in ("LICENSE", "notes.txt", "plot.png", ".hidden.jsonl"):
        (tmp_path / name).write_bytes(b"\xff no rows")
    (tmp_path / "README.md").write_text("# Rows")
    assert read(tmp_path).answers == ("1",)
    (tmp_path / "README.md").write_bytes(b"# Rows\n\xff")
    with pytest.raises(ConfigError, match=r"task\.train: .*README\.md, line 2: found byte 0xff"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["state.json", "dataset_dict.json"])
def test_a_folder_of_save_to_disk_is_refused_with_the_way_out(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    (tmp_path / "data-00000-of-00001.arrow").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"was written by save_to_disk; .*to_parquet"):
        read(tmp_path)


def test_a_folder_in_a_format_of_the_library_alone_is_read_by_it(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("1 + 1?\n2 + 2?\n")
    assert read(tmp_path, prompt="text", answer="text").prompts == ("1 + 1?", "2 + 2?")
