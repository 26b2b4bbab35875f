"""README and docs/ as tests read them: prose, links, headings, code and the commands in it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[3]
PAGES = sorted([ROOT / "README.md", ROOT / "deploy" / "README.md", *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"^(`{3,})(\w*)\n(.*?)^\1[ ]*$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
LINK = re.compile(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"")
PROGRAMS = {"rlsys", "make", "python"}
PLACEHOLDERS = re.compile(r"\[(CONFIG|key=value \.\.\.|GSM8K_FOLDER)\]")


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def prose(page: Path) -> str:
    """The page without blocks and spans of code."""
    without = FENCE.sub("", text(page))
    return SPAN.sub("", "\n".join(line for line in without.splitlines() if not line.startswith("    ")))


def links(page: Path) -> list[str]:
    return [target or image for target, image in LINK.findall(prose(page))]


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    without = FENCE.sub("", text(page))
    heads = re.findall(r"^#+ (.+?)\s*$", without, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def blocks(page: Path, language: str) -> list[str]:
    return [body for _, found, body in FENCE.findall(text(page)) if found == language]


def spans(page: Path) -> list[str]:
    return SPAN.findall(FENCE.sub("", text(page)))


def commands(page: Path) -> Iterator[list[str]]:
    """Every command line of rlsys, make and python in code, split as a shell does; no variables, comments, folders."""
    body = FENCE.sub("", text(page)).replace("\\\n", " ")
    lines = [line for line in body.splitlines() if line.startswith("    ")]
    for line in [*lines, *spans(page)]:
        try:
            words = shlex.split(PLACEHOLDERS.sub("", line), comments=True)
        except ValueError:  # an apostrophe: no command
            continue
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words = words[1:]
        if len(words) > 1 and Path(words[0]).name in PROGRAMS and re.fullmatch(r"[a-z-]+", words[1]):
            yield [Path(words[0]).name, *words[1:]]
