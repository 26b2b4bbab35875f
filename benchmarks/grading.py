"""Accuracy of the grader on an adversarial table and on GSM8K's reference solutions, beside math-verify alone.

    python -m benchmarks.grading [GSM8K_FOLDER] [--write]

GSM8K_FOLDER holds train.jsonl and test.jsonl with columns question and answer. Each solution is graded against its
answer, its answer plus one, and the next problem's answer if that differs, as written and in the formats of FORMATS.
`--write` puts the rows in which math-verify alone disagrees into docs/grading.md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from rlsys.config import RewardSection
from rlsys.math_grading.answers import grade
from rlsys.rewards.grader_pool import ERROR, RIGHT, TIMEOUT, GraderPool
from tests.unit.math_grading import grading_table

TIME_LIMIT_S = 10.0  # per grade; math-verify does not finish slower cases at all
FORMATS = (
    "{} is it.\n#### {}",
    r"\boxed{{{}}}",
    r"so $\boxed{{\${}}}$.",
    r"\boxed{{x = {}}}",
    r"\boxed{{{} \text{{ apples}}}}",
    r"\boxed{{{}.00}}",
    r"\[ \boxed{{\textbf{{{}}}}} \]",
    "#### **{}**",
    "#### ${}",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    table(arguments.write)
    if arguments.folder:
        for split in ("test", "train"):
            gsm8k(split, arguments.folder / f"{split}.jsonl")


def table(write: bool) -> None:
    """Grade the table through the pool, as in a run."""
    rows = grading_table.rows()
    ours, alone = (verdicts(grader, rows) for grader in (grade, grading_table.math_verify_alone))
    for name, given in (("rlsys", ours), ("math-verify alone", alone)):
        agree = sum(given[row.line] == row.verdict for row in rows)
        killed = sum(given[row.line] == "killed" for row in rows)
        print(f"table: {name}: {agree} of {len(rows)} rows as the rules say, {killed} killed or failed")
    for row in rows:
        if ours[row.line] != row.verdict:
            print(f"  line {row.line}: {ours[row.line]}, rules say {row.verdict}: {row.found} | {row.answer}")
    seconds = [timed(row.completion, row.reference) for row in rows]
    print(f"table: {times(seconds)}")
    slow = rows[int(np.argmax(seconds))]
    print(f"table: slowest {slow.found} | {slow.answer}")
    if write:
        text = grading_table.RULES.read_text(encoding="utf-8")
        head, start, rest = text.partition(grading_table.START)
        tail = grading_table.CHECKED.sub("", rest.partition(grading_table.END)[2])
        rows_apart = grading_table.differences(alone)
        checked = f"\n<!-- checked: {grading_table.fingerprint(rows_apart)} -->\n"
        grading_table.RULES.write_text(head + start + rows_apart + grading_table.END + checked + tail, encoding="utf-8")


def verdicts(grader: Callable[[str, str], float], rows: Sequence[grading_table.Row]) -> dict[int, str]:
    pool = GraderPool(RewardSection(workers=2, timeout_s=TIME_LIMIT_S, max_failed_share=1.0), grader)
    try:
        pool.grade([r"\boxed{x}"] * 4, ["y"] * 4)  # imports and the grammar's first use
        outcome = pool.grade([row.completion for row in rows], [row.reference for row in rows]).outcome
    finally:
        pool.close()
    names = {RIGHT: "equal", TIMEOUT: "killed", ERROR: "killed"}
    return {row.line: names.get(int(o), "unequal") for row, o in zip(rows, outcome, strict=True)}


def gsm8k(split: str, path: Path) -> None:
    with path.open(encoding="utf-8") as file:
        solutions = [json.loads(line)["answer"] for line in file]
    answers = [solution.rpartition("####")[2].strip() for solution in solutions]
    seconds: list[float] = []

    def count(completions: Sequence[str], references: Sequence[str]) -> str:
        right = 0
        for completion, reference in zip(completions, references, strict=True):
            before = time.perf_counter()
            right += int(grade(completion, reference))
            seconds.append(time.perf_counter() - before)
        return f"{right} of {len(completions)}"

    more = [str(int(answer.replace(",", "")) + 1) for answer in answers]
    pairs = list(zip(solutions, answers[1:] + answers[:1], answers, strict=True))
    others = [(solution, other) for solution, other, own in pairs if other.replace(",", "") != own.replace(",", "")]
    print(f"{split}: right against its own answer: {count(solutions, answers)}")
    print(f"{split}: right against its own solution: {count(solutions, solutions)}")
    print(f"{split}: right against its own answer plus one: {count(solutions, more)}")
    print(f"{split}: right against the next problem's, where it differs: {count(*zip(*others, strict=True))}")
    for pattern in FORMATS:
        texts = [pattern.format(*[answer] * pattern.count("{}")) for answer in answers]
        print(f"{split}: {pattern!r}: right {count(texts, answers)}, plus one {count(texts, more)}")
    print(f"{split}: {times(seconds)}")


def timed(completion: str, reference: str) -> float:
    before = time.perf_counter()
    grade(completion, reference)
    return time.perf_counter() - before


def times(seconds: Sequence[float]) -> str:
    median, late, most = np.quantile(seconds, [0.5, 0.99, 1.0]) * 1e3
    return f"{len(seconds)} grades, median {median:.3f} ms, 99 % below {late:.2f} ms, longest {most:.1f} ms"


if __name__ == "__main__":
    main()
