"""Whatever a model writes, a grade comes back in bounded time and memory, and nothing but a grade.

GRADING_FUZZ_EXAMPLES=2000 python -m pytest tests/unit/math_grading/test_grading_fuzz.py     # more, and others each
                                                                                             time
"""

# ruff: noqa: RUF001, because look-alikes are among the pieces

import os
import resource
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from rlsys.config import RewardSection
from rlsys.math_grading import answers
from rlsys.rewards.grader_pool import RIGHT, WRONG, GraderPool
from tests.unit.math_grading import grading_table

TIMEOUT_S = 120.0  # of a machine under load; what no limit stops takes minutes or for ever
MAX_MEMORY_MB = 700.0  # with sympy and the grammar read in it is 150
MORE = os.environ.get("GRADING_FUZZ_EXAMPLES")
FUZZ = settings(
    max_examples=int(MORE or 50),
    derandomize=MORE is None,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

REFERENCES = (
    "5",
    r"\frac{1}{3}",
    r"2\sqrt{3}",
    r"1+\sqrt{2}",
    "(x+1)^2",
    r"2^{10}",
    "n!",
    "1, 2",
    r"\{1, x\}",
    "(1, x)",
    r"[0, \pi)",
    r"(-\infty,1)\cup(3,\infty)",
    "x>3",
    "y=2x+1",
    "x^2+y^2=4",
    r"\begin{pmatrix}1\\x\end{pmatrix}",
    r"\text{yes}",
    r"3+4i",
    r"50\%",
    "5 cm",
    r"\sin x",
)
PIECES = [
    r"\frac{",
    r"\frac12",
    r"\sqrt{",
    r"\sqrt[3]{",
    r"\pi",
    r"\infty",
    r"\cup",
    r"\le",
    r"\ge",
    r"<",
    r">",
    r"=",
    r"\ne",
    r"\in",
    r"\pm",
    r"\mp",
    r"\left(",
    r"\right)",
    r"\{",
    r"\}",
    r"{",
    r"}",
    r"(",
    r")",
    r"[",
    r"]",
    r"|",
    r",",
    r";",
    r":",
    r".",
    r"+",
    r"-",
    r"*",
    r"/",
    r"^",
    r"^{",
    r"_",
    r"_{",
    r"!",
    r"%",
    r"\%",
    r"$",
    r"&",
    r"\\",
    r"\text{",
    r"\text{cm}",
    r"\sin",
    r"\cos",
    r"\ln",
    r"\log_2",
    r"\binom{",
    r"\cdot",
    r"\times",
    r"\div",
    r"\mod",
    r"\sum_{",
    r"\int",
    r"\lim_{",
    r"\prod",
    r"\begin{pmatrix}",
    r"\end{pmatrix}",
    r"\overline{",
    r"\circ",
    r"^\circ",
    r"\mathbb{R}",
    r"\emptyset",
    r"and",
    r"or",
    r"e",
    r"i",
    r"x",
    r"y",
    r"n",
    r"N",
    r"f(",
    r"0",
    r"1",
    r"2",
    r"9",
    r"10",
    r"999",
    r"99999",
    r"1e9",
    r"0.5",
    r"1,000",
    r"\boxed{",
    r"####",
    r"½",
    r"²",
    r"×",
    r"√",
    r"−",
    r"１",
    r"٤",
    r"\lfloor",
    r"\rfloor",
    r"\vec{",
    r"\dots",
    r"'",
    r"\operatorname{",
    r"\gcd(",
    r"\max(",
    r"\arcsin",
    r"\to",
    r"\Gamma",
    r"\gamma",
    r"\frac\pi2",
    r"\frac",
    r"\sqrt",
    r"\sqrt(",
    r"^(",
    r"\over",
    r"\choose",
    r"{\rm ",
    r"\bf",
    r"\mathrm{e}",
    r"\mathbf",
    r"\text",
    r"\color{",
    r"\phantom{",
    r"\mathop",
    r"\operatorname",
    r" - ",
    r"p",
    r"d",
    r"tr",
    r"'",
    r"_7",
    r"_{16}",
    r" base ",
    r"sin ",
    r"exp(",
    r"pi",
]

pieces = st.lists(st.sampled_from([*PIECES, " ", "\n", "\u202e"]), max_size=40).map("".join)
cells = st.sampled_from(
    [grading_table.expand(cell) for row in grading_table.rows() for cell in (row.found, row.answer)]
)


@st.composite
def spliced(draw: st.DrawFn) -> str:
    """Halves of two rows' texts, cut anywhere."""
    one, other = draw(cells), draw(cells)
    return one[: draw(st.integers(0, min(len(one), 300)))] + other[draw(st.integers(0, min(len(other), 300))) :]


@st.composite
def giant(draw: st.DrawFn) -> str:
    """One piece or two, many times over, closed or not."""
    one, between, other = (
        draw(st.sampled_from(PIECES)),
        draw(st.sampled_from(["", "x", "5"])),
        draw(st.sampled_from(PIECES)),
    )
    times = draw(st.sampled_from([3, 7, 20, 60, 1000, 20_000]))
    return one * times + between + other * draw(st.sampled_from([0, times]))


texts = st.text(max_size=80) | pieces | spliced() | giant()
dressed = st.tuples(texts, st.sampled_from(["{}", r"\boxed{{{}}}", "#### {}", r"\boxed{{\frac{{{}}}{{2}}}}"])).map(
    lambda parts: parts[1].format(parts[0])
)


def memory_after_a_grade(completion: str, answer: str) -> float:
    """MB that this grader process has needed at most, until now."""
    assert answers.grade(completion, answer) in (0.0, 1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.fixture(scope="module")
def pool() -> Iterator[GraderPool]:
    pool = GraderPool(RewardSection(workers=1, timeout_s=TIMEOUT_S, max_failed_share=1.0), memory_after_a_grade)
    pool.grade([r"\boxed{x}"], ["y"])  # its imports are not what is timed
    yield pool
    pool.close()


@given(st.lists(st.tuples(dressed, st.sampled_from(REFERENCES)), min_size=1, max_size=4))
@example([("\x00", "5"), ("\\boxed{\ud800}", "5"), ("\\boxed{\u202e5}", "x+1")])
@FUZZ
def test_whatever_a_model_writes_a_grade_comes_back_in_bounded_time_and_memory(
    pool: GraderPool, pairs: list[tuple[str, str]]
) -> None:
    grades = pool.grade([completion for completion, _ in pairs], [answer for _, answer in pairs])
    assert set(grades.outcome.tolist()) <= {RIGHT, WRONG}, grades.first_error  # no timeout
    assert grades.rewards.max() < MAX_MEMORY_MB


@given(texts)
@FUZZ
def test_no_answer_is_worth_two_different_numbers(text: str) -> None:
    """But a percentage, which is worth p and p/100."""
    completion = rf"\boxed{{{text}}}"
    right = [answer for answer in ("5", "6", "1/3", "50", "999") if answers.grade(completion, answer)]
    assert len(right) <= 1 or "%" in text or "percent" in text or "٪" in text, right
