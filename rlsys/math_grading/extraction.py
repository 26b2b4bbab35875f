"""Extracts the final answer of a completion, and the exact value of a plain number. No heavy imports.

The final answer is, in this order:
1. the content of the last `\\boxed{...}`: of all closed boxes, the one that opens last. Braces must balance; `\\{` and
   `\\}` do not count as braces, and a box that is not closed is ignored;
2. without a box, the rest of the line after the last `####`, the mark of GSM8K;
3. otherwise the completion has no final answer, and is wrong.
"""

from __future__ import annotations

import re
from decimal import Decimal

# Longer text is not read as a plain number; no intended answer is nearly as long.
MAX_NUMBER_CHARS = 256

_BOX_TOKEN = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_PLAIN_NUMBER = re.compile(r"[+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|[+-]?\.[0-9]+")


def extract(text: str) -> str | None:
    """Return the final answer in `text`, unchanged; None if there is none."""
    boxed = _last_box(text)
    if boxed is not None:
        return boxed
    _, mark, rest = text.rpartition("####")
    return rest.split("\n", 1)[0] if mark else None


def tidy(text: str) -> str:
    """Remove outer white space, dollar signs and a final full stop from an answer."""
    return text.replace(r"\$", "").replace("$", "").strip().removesuffix(".").rstrip()


def plain_number(text: str) -> Decimal | None:
    """Return the exact value of digits with optional sign, thousands separators and decimals; None for other text."""
    text = tidy(text)
    if len(text) > MAX_NUMBER_CHARS or not _PLAIN_NUMBER.fullmatch(text):
        return None
    return Decimal(text.replace(",", ""))


def _last_box(text: str) -> str | None:
    """Return the content of the last closed box; None without one.

    One pass over the text. The stack has an entry per open brace: the start of the content for a box, else None.
    """
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
