import contextlib
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from math_verify import LatexExtractionConfig, parse, verify

from rlsys.config import RewardSection
from rlsys.errors import ConfigError, GradingError
from rlsys.math_grading import answers
from rlsys.math_grading.extraction import extract, plain_number
from rlsys.rewards.grader_pool import ERROR, RIGHT, TIMEOUT, WRONG, GraderPool, Grades, resolve
from tests.unit.rewards import sample_graders
from tests.waiting import FAR_S, run, times, until, until_gone


def timeout_s() -> float:
    """A machine under load has to make a grade within it."""
    return 1.5 * times()


@pytest.fixture(scope="module")
def pool() -> Iterator[GraderPool]:
    """One process that does what completions say; never stops a batch."""
    pool = GraderPool(RewardSection(timeout_s=timeout_s(), max_failed_share=1.0), sample_graders.obedient)
    yield pool
    pool.close()


def grade(pool: GraderPool, *completions: str) -> Grades:
    return pool.grade(completions, ["7"] * len(completions))


def test_rewards_come_back_in_order_with_their_outcomes(pool: GraderPool) -> None:
    grades = grade(pool, "7", "8", "half", "true", "minus one")
    assert grades.rewards.tolist() == [1.0, 0.0, 0.5, 1.0, -1.0] and grades.rewards.dtype == np.float32
    assert grades.outcome.tolist() == [RIGHT, WRONG, WRONG, RIGHT, WRONG] and grades.outcome.dtype == np.int8
    assert grades.first_error == ""
    assert grades.counts() == {"reward/wrong": 3, "reward/timeouts": 0, "reward/errors": 0}


def test_an_empty_batch_has_no_grades(pool: GraderPool) -> None:
    assert len(grade(pool).rewards) == 0


def test_graders_run_in_a_process_of_their_own(pool: GraderPool) -> None:
    assert grade(pool, "pid").rewards[0] != np.float32(os.getpid() / 2**24)


SLOW = """
import os, pathlib, time
time.sleep(1)
with pathlib.Path(__file__).with_name("imports").open("a") as file:
    file.write(f"{os.getpid()}\\n")

def grade(completion, answer):
    return float(completion == answer)
"""
EARLY = """
import os, pathlib, sys, time
from multiprocessing import forkserver
from rlsys.config import RewardSection
from rlsys.rewards.grader_pool import GraderPool

if __name__ == "__main__":
    section = RewardSection(function="slow:grade", workers=2)
    GraderPool.begin_imports(section, "unused")
    imports = pathlib.Path(sys.argv[1], "imports")
    deadline = time.monotonic() + float(sys.argv[2])
    while not imports.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    print(imports.exists())
    pool = GraderPool(section, "unused")
    print(pool.grade(["1", "2", "3"], ["1", "2", "4"]).rewards.tolist())
    elsewhere = {int(pid) for pid in imports.read_text().split()} - {os.getpid()}  # the path is resolved here too
    print(elsewhere == {forkserver._forkserver._forkserver_pid})
    pool.close()
"""


def test_a_grader_is_imported_before_its_pool_is_made_and_once_for_all_processes(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "early.py").write_text(EARLY)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    done = run([sys.executable, str(tmp_path / "early.py"), str(tmp_path), str(20 * times())], env=environment)
    assert done.stdout.splitlines() == ["True", "[1.0, 1.0, 0.0]", "True"], done.stderr


@pytest.mark.parametrize("hang", ["sleep", "long call into C"])
def test_a_grader_without_end_is_killed_and_the_others_are_graded(pool: GraderPool, hang: str) -> None:
    grades = grade(pool, "7", hang, *["7"] * 50, hang, "8")
    assert grades.outcome.tolist() == [RIGHT, TIMEOUT, *[RIGHT] * 50, TIMEOUT, WRONG]
    assert grades.rewards[1] == 0
    assert grades.counts() == {"reward/wrong": 1, "reward/timeouts": 2, "reward/errors": 0}
    assert f"timeout_s = {timeout_s():g} s" in grades.first_error


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("raise", "RuntimeError: no such luck"),
        ("raise awkwardly", "AwkwardError"),
        ("nan", "returned nan; wanted a finite number"),
        ("infinite", "returned inf; wanted a finite number"),
        ("text", "returned '1.0' of type str; wanted a number"),
        ("none", "of type NoneType; wanted a number"),
        ("memory", "MemoryError"),
        ("sys.exit", "SystemExit: 3"),
        ("exit", "process died: exit code 3"),
        ("segfault", "process died: signal 11 (Segmentation fault)"),
    ],
)
def test_a_grader_that_fails_is_an_error_and_the_others_are_graded(pool: GraderPool, fault: str, text: str) -> None:
    grades = grade(pool, "7", fault, "7", "8")
    assert grades.outcome.tolist() == [RIGHT, ERROR, RIGHT, WRONG]
    assert grades.rewards.tolist() == [1.0, 0.0, 1.0, 0.0]
    assert text in grades.first_error
    assert grades.counts()["reward/errors"] == 1


def test_what_is_right_and_what_a_failure_counts_as_are_the_jobs_to_say() -> None:
    section = RewardSection(timeout_s=timeout_s(), max_failed_share=1.0, solved_at=-1.5, failed_grade=-7)
    pool = GraderPool(section, sample_graders.numbers)
    try:
        grades = grade(pool, "-2", "-1.5", "3e9", "0.25", "nan", "1e39")
        assert grades.outcome.tolist() == [WRONG, RIGHT, RIGHT, RIGHT, ERROR, ERROR]
        assert grades.rewards.tolist() == [-2.0, -1.5, 3e9, 0.25, -7.0, -7.0]
    finally:
        pool.close()


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e39"])
def test_a_reward_that_is_no_finite_number_names_its_grader_and_its_problem(value: str) -> None:
    section = RewardSection(
        timeout_s=timeout_s(), max_failed_share=0.0, function="tests.unit.rewards.sample_graders:numbers"
    )
    pool = GraderPool(section, sample_graders.obedient)
    try:
        with pytest.raises(GradingError) as caught:
            pool.grade(["1", value], ["7", "8"], ["training problem 3", "training problem 5"])
        message = str(caught.value)
        for part in (
            "tests.unit.rewards.sample_graders:numbers",
            "training problem 5",
            "answer '8'",
            f"returned {float(value)}",
        ):
            assert part in message, message
        assert "wanted a finite number" in message
    finally:
        pool.close()


def test_a_batch_in_which_most_graders_failed_stops_the_run() -> None:
    pool = GraderPool(RewardSection(timeout_s=timeout_s(), max_failed_share=0.5), sample_graders.obedient)
    try:
        assert grade(pool, "7", "raise").counts()["reward/errors"] == 1  # a half is not above a half
        with pytest.raises(GradingError) as caught:
            grade(pool, "7", "raise", "sleep", "nan", "7")
        for part in ("3 of 5 grades failed (1 timeouts, 2 errors, 4 tried)", "max_failed_share = 0.5", "no such luck"):
            assert part in str(caught.value)
        assert "completion 1 'raise'" in str(caught.value)
        assert grade(pool, "7", "8").rewards.tolist() == [1.0, 0.0]  # the pool is good for the next batch
    finally:
        pool.close()


def test_a_lost_batch_is_not_waited_for() -> None:
    pool = GraderPool(RewardSection(timeout_s=timeout_s(), max_failed_share=0.01), sample_graders.obedient)
    try:
        before = time.monotonic()
        with pytest.raises(GradingError, match="2 of 100 grades failed"):
            grade(pool, *["sleep"] * 100)
        assert time.monotonic() - before < 100 * timeout_s() / 2
    finally:
        pool.close()


def test_no_failure_is_allowed_at_share_zero() -> None:
    pool = GraderPool(RewardSection(timeout_s=timeout_s(), max_failed_share=0.0), sample_graders.obedient)
    try:
        with pytest.raises(GradingError, match="1 of 3 grades failed"):
            grade(pool, "7", "raise", "7")
    finally:
        pool.close()


def test_a_grade_whose_process_was_killed_from_outside_is_repeated_and_counts_as_no_failure(tmp_path: Path) -> None:
    pool = GraderPool(RewardSection(timeout_s=600, max_failed_share=0.0), sample_graders.killed_once)
    try:
        files = [str(tmp_path / name) for name in "abc"]
        grades = pool.grade(files, ["1", "0.5", "0"])
        assert grades.rewards.tolist() == [1.0, 0.5, 0.0] and grades.counts()["reward/errors"] == 0
    finally:
        pool.close()


def test_a_grade_that_is_killed_twice_is_an_error(pool: GraderPool) -> None:
    grades = grade(pool, "7", "killed", "7")
    assert grades.outcome.tolist() == [RIGHT, ERROR, RIGHT] and "signal 9" in grades.first_error


def test_an_idle_process_that_was_killed_is_replaced() -> None:
    pool = GraderPool(RewardSection(timeout_s=600, max_failed_share=0.0), sample_graders.obedient)
    try:
        pid = round(float(grade(pool, "pid").rewards[0]) * 2**24)
        os.kill(pid, signal.SIGKILL)
        time.sleep(0.5)
        assert grade(pool, "7", "8").outcome.tolist() == [RIGHT, WRONG]
    finally:
        pool.close()


def test_two_processes_grade_a_batch_in_order() -> None:
    pool = GraderPool(RewardSection(workers=2, timeout_s=600, max_failed_share=0.0), sample_graders.obedient)
    try:
        assert grade(pool, *["7", "8"] * 100).outcome.tolist() == [RIGHT, WRONG] * 100
    finally:
        pool.close()


def test_progress_counts_grades_as_they_end_while_one_still_runs(pool: GraderPool) -> None:
    before = pool.progress()
    grading = threading.Thread(target=grade, args=(pool, "7", "raise", "sleep"))
    grading.start()
    until(lambda: pool.progress() == before + 2, "two grades", state=pool.progress, poll_s=0.01)
    assert grading.is_alive(), "the third one sleeps"
    grading.join()


def _until_the_pool_ends(pool: GraderPool, *completions: str) -> None:
    with contextlib.suppress(Exception):
        grade(pool, *completions)


def test_close_kills_what_still_runs() -> None:
    pool = GraderPool(RewardSection(timeout_s=FAR_S, max_failed_share=1.0), sample_graders.obedient)
    grade(pool, "7")
    # more text than a pipe holds, so that the pool is also stuck in sending
    stuck = threading.Thread(target=_until_the_pool_ends, args=(pool, "sleep", *["x" * 2000] * 200), daemon=True)
    stuck.start()
    time.sleep(0.3)
    pool.close()  # and does not wait for the grade


OWNER = """
import os, threading
from tests.unit.rewards import sample_graders
from rlsys.config import RewardSection
from rlsys.rewards.grader_pool import GraderPool
pool = GraderPool(RewardSection(timeout_s=600, max_failed_share=1.0), sample_graders.obedient)
print(round(float(pool.grade(["pid"], ["7"]).rewards[0]) * 2**24), flush=True)
pool.grade(["sleep"], ["7"])
"""


def test_grader_processes_do_not_outlive_a_killed_owner() -> None:
    path = os.pathsep.join([str(Path(__file__).parents[3]), *sys.path])
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    time.sleep(0.3)
    owner.kill()
    owner.wait()
    owner.stdout.close()
    until_gone([pid], "a grader of a killed process to end")


def test_the_function_of_the_config_goes_before_the_task_s_own() -> None:
    section = RewardSection(function="tests.unit.rewards.sample_graders:bonus_of_three", timeout_s=600)
    pool = GraderPool(section, sample_graders.obedient)
    try:
        assert grade(pool, "8").rewards.tolist() == [3.0]
    finally:
        pool.close()


def test_a_method_of_a_picklable_task_can_grade() -> None:
    pool = GraderPool(RewardSection(timeout_s=600), sample_graders.Stateful(0.25).grade)
    try:
        assert grade(pool, "8").rewards.tolist() == [0.25]
    finally:
        pool.close()


def test_a_function_that_cannot_travel_is_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match=r"cannot be sent to the grader processes .* 'package.module:function'"):
        GraderPool(RewardSection(), lambda completion, answer: 1.0)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("tests.unit.rewards.sample_graders", "wanted 'package.module:function'"),
        (":obedient", "wanted 'package.module:function'"),
        ("no_such_module:grade", "importing no_such_module raised ModuleNotFoundError"),
        ("tests.unit.rewards.sample_graders:obediant", "has no 'obediant'; did you mean 'obedient'?"),
        ("tests.unit.rewards.sample_graders:not_a_function", "is a int; wanted a function"),
    ],
)
def test_a_path_that_names_no_function_is_refused_before_anything_starts(path: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        GraderPool(RewardSection(function=path), sample_graders.obedient)
    assert message in str(caught.value) and path in str(caught.value)


def test_a_path_may_lead_into_a_class() -> None:
    assert resolve("rlsys.tasks.arithmetic:Arithmetic.grade")("\\boxed{6}", "6") == 1.0


def test_an_answer_that_would_compute_for_ever_is_wrong_and_not_computed() -> None:
    pool = GraderPool(RewardSection(timeout_s=600, max_failed_share=1.0), answers.grade)
    try:
        grades = pool.grade(["\\boxed{9^{9^{9^9}}}", "\\boxed{\\frac{1}{2}}"], ["7", "0.5"])
        assert grades.outcome.tolist() == [WRONG, RIGHT]
    finally:
        pool.close()


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{1\right.}", r"\left\{1\right."),
        (r"\boxed{1+\boxed{5}}", "5"),
        (r"\boxed{5} and \boxed{6", "5"),
        (r"{ \boxed{5}", "5"),
        (r"} \boxed{5}", "5"),
        (r"\boxed {5}", "5"),
        (r"\fbox{5}", "5"),
        (r"\boxed{}", ""),
        ("He has 3.\n#### 1,234\nDone", " 1,234"),
        ("#### 1\n#### 2", " 2"),
        ("\\boxed{3}\n#### 4", "3"),
        ("\\boxed{3\n#### 4", " 4"),
        ("the answer is 5", None),
        (r"boxed{5}", None),
        (r"\boxed{{5}", None),
        (r"\\boxed{5}", None),
        ("", None),
    ],
)
def test_the_final_answer_is_the_last_closed_box_or_else_the_last_mark(text: str, answer: str | None) -> None:
    assert extract(text) == answer


def test_extraction_takes_linear_time() -> None:
    before = time.process_time()
    extract("\\boxed{" * 100_000)
    extract("\\boxed{1}" * 100_000 + "#" * 100_000)
    assert time.process_time() - before < 2


@pytest.mark.parametrize(
    "text", ["1,23", "1234,567", "1.2.3", "1e3", "-", ".", "--5", "12 34", "\uff11\uff12", "1/2", "nan", "inf", ""]
)
def test_what_is_no_plain_number_has_no_plain_value(text: str) -> None:
    assert plain_number(text) is None


EQUAL = [
    ("42", "42"),
    ("1,234", "1234"),
    ("1,234,567.50", "1234567.5"),
    ("$1,234", "1234"),
    (r"\$18.00", "18"),
    ("18.", "18"),
    ("+7", "7"),
    ("-0", "0"),
    ("007", "7"),
    (".5", "0.5"),
    ("3/4", "0.75"),
    (r"\frac{2}{4}", r"\frac{1}{2}"),
    (r"\frac12", "0.5"),
    (r"\dfrac{1}{2}", r"\tfrac{1}{2}"),
    (r"3\frac{1}{2}", "3.5"),
    ("0.33333333", r"\frac{1}{3}"),
    (r"50\%", "50"),
    ("x=5", "5"),
    ("5 cm", "5"),
    (r"12\text{ apples}", "12"),
    (r"\sqrt{8}", r"2\sqrt{2}"),
    ("x^2+2x+1", "(x+1)^2"),
    (r"\{1,2\}", r"\{2,1\}"),
    (r"(-\infty,2]", r"(-\infty, 2]"),
    (r"\text{Monday}", "Monday"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
]
UNEQUAL = [
    ("42", "43"),
    ("1,234", "1235"),
    ("1.5", "1.50001"),
    ("10000000000000000000000001", "10000000000000000000000002"),
    ("-7", "7"),
    ("1,23", "1.23"),
    (r"\frac{1}{3}", "0.333"),
    (r"\frac{1}{2}", r"\frac{2}{1}"),
    (r"\pi", "3.14"),
    ("(1,2)", "(2,1)"),
    ("[1,2)", "(1,2]"),
    (r"\{1,2\}", r"\{1,3\}"),
    ("n", "m"),
    (r"\text{blue}", r"\text{red}"),
    (r"\frac{1", "1"),
    ("}{", "5"),
    ("", "0"),
    ("((((((((((5))))))))))", "5"),  # deeper than is read
    ("5+" * 150 + "0", "750"),  # longer than is read
]


@pytest.mark.parametrize(("found", "wanted"), EQUAL)
def test_equal_answers(found: str, wanted: str) -> None:
    assert answers.grade(rf"so \boxed{{{found}}}", wanted) == 1.0


@pytest.mark.parametrize(("found", "wanted"), UNEQUAL)
def test_unequal_answers(found: str, wanted: str) -> None:
    assert answers.grade(f"#### {found}", wanted) == 0.0


def test_a_reference_solution_is_right_against_itself() -> None:
    solution = "He makes 9 * 2 = $<<9*2=18>>18 a day.\n#### 18"
    assert answers.grade(solution, solution) == 1.0
    assert answers.grade("#### 19", solution) == 0.0


@pytest.mark.parametrize("reference", ["", " ", "\\boxed{}", "####"])
def test_an_empty_reference_is_an_error_and_no_wrong_answer(reference: str) -> None:
    with pytest.raises(ValueError, match=r"reference answer .* is empty"):
        answers.grade("#### 1", reference)


numbers = st.builds(
    lambda value, decimals: f"{value / 10**decimals:.{decimals}f}",
    st.integers(-2000, 2000),
    st.integers(0, 4),
)


@given(numbers, numbers)
@settings(max_examples=60, deadline=None)
def test_the_exact_path_for_plain_numbers_says_what_math_verify_says(a: str, b: str) -> None:
    latex = [LatexExtractionConfig(boxed_match_priority=0)]
    found, wanted = (parse(f"${text}$", latex, parsing_timeout=None) for text in (a, b))
    verdict = verify(wanted, found, timeout_seconds=None)
    assert answers.equal(a, b) == verdict == math.isclose(float(a), float(b), abs_tol=1e-9)


def test_model_output_is_never_executed(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for text in (
        f"__import__('os').system('touch {mark}')",
        f"1+__import__('pathlib').Path('{mark}').touch()",
        rf"\text{{__import__('os').system('touch {mark}')}}",
    ):
        answers.grade(f"\\boxed{{{text}}}", "5")
        answers.grade(f"#### {text}", "5")
        answers.grade(text, "5")
    assert not mark.exists()


PIECES = [r"\pi ", r"\infty ", r"\cup ", r"\le ", r"\left", r"\right", r"\frac{", r"\sqrt{", r"\text{", r"\{", r"\}"]
mathematics = st.lists(
    st.sampled_from([*"0123456789xyn+-*/(){}[]|<>=,.%$ \n", *PIECES, r"\boxed{", "####"]), max_size=24
).map("".join)


@given(st.text(max_size=60) | mathematics)
@settings(max_examples=150, deadline=None)
@example("\x00")
@example("\ud800")
@example("\u202e5")
def test_whatever_a_model_writes_is_graded_right_or_wrong_in_bounded_time(text: str) -> None:
    before = time.process_time()
    for completion in (text, f"\\boxed{{{text}}}", f"#### {text}"):
        assert answers.grade(completion, "5") in (0.0, 1.0)
    assert time.process_time() - before < 10
