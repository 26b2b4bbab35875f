"""The rules of docs/grading.md on the rows of grading_table.tsv, through the pool as in a run."""

import time
from collections import Counter
from collections.abc import Iterator

import pytest

from rlsys.config import RewardSection
from rlsys.math_grading import algebra, answers
from rlsys.math_grading.answers import MAX_ANSWER_CHARS
from rlsys.math_grading.spelling import spell
from rlsys.math_grading.units import read_quantity
from rlsys.rewards.grader_pool import ERROR, RIGHT, TIMEOUT, GraderPool
from tests.unit.math_grading import grading_table
from tests.unit.math_grading.grading_table import Row

ROWS = grading_table.rows()
# Rows on which math-verify alone needs more time than a test has; they are measured by benchmarks/grading.py only.
COSTLY_ALONE = "bounds"


ALONE = "math-verify alone: "  # before a completion


def either(completion: str, answer: str) -> float:
    if completion.startswith(ALONE):
        return grading_table.math_verify_alone(completion.removeprefix(ALONE), answer)
    return answers.grade(completion, answer)


@pytest.fixture(scope="module")
def pool() -> Iterator[GraderPool]:
    """For both graders, in one process: it imports both in seconds, and sympy fills its caches in more."""
    pool = GraderPool(RewardSection(workers=1, timeout_s=60, max_failed_share=1.0), either)
    yield pool
    pool.close()


def verdicts(pool: GraderPool, rows: list[Row], before: str = "") -> dict[int, str]:
    outcome = pool.grade([before + row.completion for row in rows], [row.reference for row in rows]).outcome
    names = {RIGHT: "equal", TIMEOUT: "killed", ERROR: "failed"}
    return {row.line: names.get(int(o), "unequal") for row, o in zip(rows, outcome, strict=True)}


@pytest.fixture(scope="module")
def canary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Rows of code would leave a file CANARY where the graders run."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("canary")
        patch.chdir(folder)
        yield
        assert not list(folder.iterdir()), "model output was executed"


def test_the_grader_follows_the_rules_on_every_row(canary: None, pool: GraderPool) -> None:
    found = verdicts(pool, ROWS)
    wrong = [f"line {row.line}: {found[row.line]}: {row}" for row in ROWS if found[row.line] != row.verdict]
    assert not wrong, "\n".join(wrong)


WRITE = "run python -m benchmarks.grading --write"


def test_the_documented_list_is_of_this_table_and_of_these_libraries() -> None:
    """So that all of its rows were computed with them."""
    assert grading_table.checked() == grading_table.fingerprint(grading_table.documented()), WRITE


def alone_says(pool: GraderPool, rows: list[Row]) -> tuple[list[str], list[str]]:
    """Of these rows, the differences that are documented, and those that there are."""
    found = verdicts(pool, [row for row in rows if row.category != COSTLY_ALONE], ALONE)
    lines = set(grading_table.documented().splitlines())
    listed = [line for row in rows for line in grading_table.as_documented(row) if line in lines]
    return [line for line in listed if f"({COSTLY_ALONE}," not in line], grading_table.differences(found).splitlines()


def test_some_of_the_documented_list_is_what_math_verify_alone_says(canary: None, pool: GraderPool) -> None:
    listed, found = alone_says(pool, ROWS[::12])
    assert listed == found and len(found) > 30, WRITE


@pytest.mark.soak
def test_the_documented_list_says_what_math_verify_alone_says(canary: None, pool: GraderPool) -> None:
    listed, found = alone_says(pool, ROWS)
    assert listed == found and len(found) == len(listed), WRITE


def test_each_documented_difference_is_a_row_of_the_table() -> None:
    endings = Counter(f"{row.found}  |  {row.answer}  ({row.category}, {row.why})" for row in ROWS)
    verdict = {f"{row.found}  |  {row.answer}  ({row.category}, {row.why})": row.verdict for row in ROWS}
    for line in grading_table.documented().splitlines():
        said, alone, rest = line[:8].strip(), line[9:17].strip(), line[18:]
        assert endings[rest] == 1 and verdict[rest] == said != alone, line


def test_the_table_is_large_and_has_both_verdicts_in_every_category() -> None:
    counts = Counter((row.category, row.verdict) for row in ROWS)
    assert len(ROWS) >= 300 and {row.verdict for row in ROWS} == {"equal", "unequal"}
    assert not [
        c for c in {row.category for row in ROWS} - {"code"} if not counts[c, "equal"] or not counts[c, "unequal"]
    ]
    assert len({(row.completion, row.reference) for row in ROWS}) == len(ROWS)


def test_a_number_as_reference_never_asks_math_verify(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(algebra, "parse", None)
    asked = []
    for row in ROWS:
        if row.reference.replace(",", "").lstrip("-").isascii() and row.reference.lstrip("-").isdigit():
            asked.append(row)
            assert answers.grade(row.completion, row.reference) == (row.verdict == "equal"), row
    assert len(asked) > 150


def test_long_texts_are_compared_in_linear_time() -> None:
    parts = (
        r"\text{",
        " ",
        r"\frac{",
        "{",
        "1 000 ",
        r"\left",
        ", ",
        "\u202e",
        "½",
        "^",
        "1,",
        r"\ ",
        r"{,",
        r"\text{ ",
        r"\frac",
        r"\sqrt[",
        r"\sqrt(",
        r"{\rm ",
        r"\over ",
        r"\phantom{",
        r"\textbf{\textit{",
        "(",
        "^(",
        "^-1",
        "√1",
        "sin ",
        r"\text{e}",
    )
    for part in parts:
        length = 2_500 if part in ("½", "√1") else 10_000  # a few characters for one, which take as long
        text, before = part * (length // len(part)), time.process_time()
        assert answers.equal(text + "5", text + "5") and not answers.equal(text + "5", text + "6")
        assert time.process_time() - before < 0.6, part


@pytest.mark.parametrize(
    "piece",
    ["^\\circ ", r"\text{a}", r"\text{a} ", ". ", ".", "a ", "a/", "a / ", "m^2 ", "€", r"\cdot ", r"cm \cdot ", "C "],
)
def test_a_row_of_units_is_read_in_time(piece: str) -> None:
    before = time.process_time()
    for text in (f"5 {piece * 60}", f"5 {piece * 60}!", f"{piece * 60}5"):
        read_quantity(text[:MAX_ANSWER_CHARS])
    assert time.process_time() - before < 2


@pytest.mark.parametrize(
    "text",
    [
        "10^{10^{10}}",
        "x^{9^{9^9}}",
        "x^{99999}",
        "x^{999 \\cdot 999}",
        "(x+1)^{100}",
        "((x^2)^2)^2",
        "x^x^x",
        "99999!",
        "(9!)!",
        "9!!",
        "2^{9!}",
        r"\binom{99999}{2}",
        r"\sqrt[99999]{2}",
        r"\sum_{i=1}^{9} i",
        r"\int_0^1 x dx",
        "((((((((x))))))))",
        r"\sin \sin \sin \sin \sin \sin \sin \sin \sin x",
    ],
)
def test_an_expression_that_could_be_costly_is_refused_unread(text: str) -> None:
    assert not algebra.affordable(spell(text))


@pytest.mark.parametrize(
    "text",
    [
        "2^{1000}",
        "x^{2^3}",
        "e^{x^2}",
        "(x+1)^{20}",
        "100!",
        "n!",
        r"\binom{n}{k}",
        r"\sqrt[3]{x}",
        "2^{n+1}",
        "((x+1)^2)^3",
    ],
)
def test_an_expression_of_usual_size_is_read(text: str) -> None:
    assert algebra.affordable(spell(text))


@pytest.mark.parametrize(
    ("one", "other"),
    [("N", "n"), ("2N", "2n"), ("N+n", "2n"), ("xY", "xy"), (r"\Delta+1", r"\delta+1"), ("A_1", "a_1")],
)
def test_the_case_of_a_letter_matters_to_both_sides(one: str, other: str) -> None:
    assert not answers.equal(one, other) and not answers.equal(other, one)
    assert answers.equal(one, one) and answers.equal(f"{one}+x^2", f"x^2+{one}")
