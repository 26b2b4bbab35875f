"""Rows of grading_table.tsv: what a model answers, the reference, and the verdict of docs/grading.md.

In its cells <U+200F> is that character, <LF> a line break, and <text x 1000> the text 1000 times.
"""

import hashlib
import re
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from math_verify import LatexExtractionConfig, parse, verify

TABLE = Path(__file__).with_name("grading_table.tsv")
RULES = Path(__file__).parents[3] / "docs" / "grading.md"
START, END = "<!-- differences -->\n\n```text\n", "```\n"
CHECKED = re.compile(r"\n<!-- checked: ([0-9a-f]{16}) -->\n")
LIBRARIES = ("math-verify", "latex2sympy2-extended", "sympy")


class Row(NamedTuple):
    line: int
    category: str
    verdict: str  # equal or unequal
    found: str  # as in the file
    answer: str
    why: str

    @property
    def completion(self) -> str:
        text = expand(self.found)
        whole = self.category == "where" or r"\boxed" in text or "####" in text
        return text if whole else rf"\boxed{{{text}}}"

    @property
    def reference(self) -> str:
        return expand(self.answer)


def rows() -> list[Row]:
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    return [Row(number, *line.split("\t")) for number, line in enumerate(lines[1:], 2)]


def expand(cell: str) -> str:
    cell = re.sub(r"<U\+([0-9A-F]{4,6})>", lambda match: chr(int(match[1], 16)), cell).replace("<LF>", "\n")
    return re.sub(r"<(.+?) x ([0-9]+)>", lambda match: match[1] * int(match[2]), cell)


def math_verify_alone(completion: str, answer: str) -> float:
    """What the library says without rlsys's reading, its LaTeX grammar only. Its time is the pool's to limit."""
    latex = [LatexExtractionConfig(boxed_match_priority=0)]
    gold = parse(answer if r"\boxed" in answer else rf"\boxed{{{answer}}}", latex, parsing_timeout=None)
    return float(verify(gold, parse(completion, latex, parsing_timeout=None), timeout_seconds=None))


def as_documented(row: Row) -> list[str]:
    """The lines that may stand for the row: one for each verdict that differs from the rules."""
    rest = f"{row.found}  |  {row.answer}  ({row.category}, {row.why})"
    return [f"{row.verdict:8} {other:8} {rest}" for other in ("equal", "unequal", "killed", "failed")]


def differences(alone: dict[int, str]) -> str:
    """The rows in which math-verify alone, by line of the table, says something else than the rules."""
    return "".join(
        f"{row.verdict:8} {alone[row.line]:8} {row.found}  |  {row.answer}  ({row.category}, {row.why})\n"
        for row in rows()
        if row.line in alone and alone[row.line] != row.verdict
    )


def fingerprint(listed: str) -> str:
    """Of all that decides whether the list is right: the list, the table, and the libraries."""
    versions = [f"{name} {version(name)}" for name in LIBRARIES]
    parts = [listed, TABLE.read_text(encoding="utf-8"), *versions]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def checked() -> str:
    """The fingerprint of the list when all rows were last computed."""
    found = CHECKED.search(RULES.read_text(encoding="utf-8"))
    return found[1] if found else ""


def documented() -> str:
    return RULES.read_text(encoding="utf-8").partition(START)[2].partition(END)[0]
