"""The final answer in a text, as written, and the exact value of a plain number. No heavy imports.

The answer of a completion:
1. what is inside the last `\\boxed{...}`: of the boxes that close, the one that opens last. Braces balance, `\\{` and
   `\\}` do not count, and a box that never closes is none;
2. without one, GSM8K's mark: the rest of the line after the last `####`;
3. otherwise there is none, and the completion is wrong.
"""

from __future__ import annotations

import re
from decimal import Decimal

# A number of more characters is no plain number; far more than any that is meant as an answer.
MAX_NUMBER_CHARS = 256

_BOX_TOKEN = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_PLAIN_NUMBER = re.compile(r"[+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|[+-]?\.[0-9]+")


def extract(text: str) -> str | None:
    """The final answer in `text`, as written; None where there is none."""
    boxed = _last_box(text)
    if boxed is not None:
        return boxed
    _, mark, rest = text.rpartition("####")
    return rest.split("\n", 1)[0] if mark else None


def tidy(text: str) -> str:
    """An answer without outer whitespace, dollar signs and a final full stop."""
    return text.replace(r"\$", "").replace("$", "").strip().removesuffix(".").rstrip()


def plain_number(text: str) -> Decimal | None:
    """The exact value of digits with sign, thousands separators and decimals; None for anything else."""
    text = tidy(text)
    if len(text) > MAX_NUMBER_CHARS or not _PLAIN_NUMBER.fullmatch(text):
        return None
    return Decimal(text.replace(",", ""))


def _last_box(text: str) -> str | None:
    """One pass with a stack of open braces: where the content starts for a box's, None for others."""
    open_braces: list[int | None] = []
    last = None
    for token in _BOX_TOKEN.finditer(text):
        if token[0] == "{":
            open_braces.append(None)
        elif token[0] == "}":
            start = open_braces.pop() if open_braces else None
            if start is not None and (last is None or start > last[0]):
                last = (start, token.start())
        elif token[0].endswith("{") and token[0] != r"\{":
            open_braces.append(token.end())
    return None if last is None else text[slice(*last)]
