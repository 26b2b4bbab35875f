"""Parses and compares numbers in other bases than ten. Section 3 of docs/grading.md.

    52_7, 1101_{\\text{two}}, 1A_{16}, 52 (base 7)

Two numbers are equal if their values and their bases are equal. A number without a base is in base ten, and a number
marked as base ten is a plain number.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_NAMES = (
    *(("two binary bin", 2), ("three ternary", 3), ("four quaternary", 4), ("five", 5), ("six", 6), ("seven", 7)),
    *(("eight octal oct", 8), ("nine", 9), ("ten decimal dec", 10), ("eleven", 11), ("twelve duodecimal", 12)),
    *(("thirteen", 13), ("fourteen", 14), ("fifteen", 15), ("sixteen hexadecimal hex", 16), ("twenty", 20)),
)
_BASES = {name: base for names, base in _NAMES for name in names.split()}
MAX_BASE = 36
_GROUP = r"\{(?:[^{}]|\{[^{}]*\})*\}"
_DIGITS = r"[0-9A-Za-z]+(?: [0-9A-Z]+)*"
_NUMBER = rf"(?P<whole>{_DIGITS})?(?:\.(?P<part>{_DIGITS})?(?:\\(?:overline|bar)\{{(?P<period>{_DIGITS})\}})?)?"
_BASE = rf" ?_ ?(?P<index>{_GROUP}|[0-9]+|[A-Za-z])|(?P<words>(?: in| ?\\text| ?\(| base).*)"
_BASED = re.compile(
    rf"(?P<sign>[+-]? ?)(?P<open>(?:\\text|\\overline)?[{{(])? ?{_NUMBER} ?(?P<close>[)}}])?(?:{_BASE})", re.DOTALL
)
_WITHIN = re.compile(rf"(?<![A-Za-z0-9_.}}\\])([0-9]+(?:\.[0-9]+)?) ?_ ?({_GROUP}|[0-9]+|[A-Za-z])")
_WORDY = re.compile(r"\\text|[{}()]|\bin\b|\bbase\b")


@dataclass(frozen=True, slots=True)
class Based:
    """Number with an explicit base."""

    digits: str
    base: int | str  # a letter if the base is unknown: 121_b
    value: Fraction | None  # None, and the digits are compared, if the base is a letter or a digit is too large for it
    lower: bool  # the digits include lower-case letters, which may instead be unknowns


def same(prediction: str, reference: str) -> bool | None:
    """Return whether two spelled texts are the same number in the same base; None if neither has a base but ten."""
    if "_" not in prediction + reference and "base" not in prediction + reference:
        return None
    a, b = read(prediction), read(reference)
    if a is not None and b is not None and a.lower and b.lower:
        return None
    if a is not None and a.lower and b is None:  # letters beside a text without a base are unknowns
        a = None
    elif b is not None and b.lower and a is None:
        b = None
    if (a is None or a.base == 10) and (b is None or b.base == 10):
        return None
    if a is None or b is None or a.base != b.base:
        return False
    return a.digits == b.digits if a.value is None or b.value is None else a.value == b.value


def decimal(text: str) -> str:
    """Remove a base-ten mark, and replace numbers in other bases inside an expression by their decimal values."""
    based = read(text)
    if based is not None and based.base == 10 and not based.lower and based.value is not None:
        return based.digits
    return _WITHIN.sub(_inside, text) if "_" in text else text


def read(text: str) -> Based | None:
    """Parse a text that consists of exactly one number with a base; None for other text."""
    match = _BASED.fullmatch(text.strip())
    if match is None or bool(match["open"]) != bool(match["close"]):
        return None
    base = _base(match["index"] if match["index"] is not None else match["words"])
    parts = [(match[name] or "").replace(" ", "") for name in ("whole", "part", "period")]
    letters = "".join(parts)
    if base is None or not letters:
        return None
    lower = letters != letters.upper()
    if letters.isalpha() and (len(letters) < 2 or not isinstance(base, int)):
        return None  # a variable with an index, such as x_1
    if any(c.isalpha() for c in letters) and not (isinstance(base, int) and base > 10):
        return None
    whole, part, period = (piece.upper() for piece in parts)
    sign = match["sign"].strip().replace("+", "")
    digits = (
        sign + (whole or "0") + ("." + part + (rf"\overline{{{period}}}" if period else "") if part or period else "")
    )
    value = _value(whole, part, period, base) if isinstance(base, int) else None
    if value is None and isinstance(base, int):
        return Based(digits, base, None, lower and match["open"] is None)
    return Based(digits, base, -value if value is not None and sign else value, lower and match["open"] is None)


def _base(text: str) -> int | str | None:
    word = _WORDY.sub(" ", text).strip(" .,").casefold()
    if word.isdigit():
        return int(word) if len(word) < 3 and 2 <= int(word) <= MAX_BASE else None
    return _BASES.get(word, word if len(word) == 1 and word.isalpha() else None)


def _value(whole: str, part: str, period: str, base: int) -> Fraction | None:
    try:
        numbers = [int(digits, base) if digits else 0 for digits in (whole, part, period)]
    except ValueError:
        return None
    after = Fraction(numbers[1])
    if period:
        after += Fraction(numbers[2], base ** len(period) - 1)
    return numbers[0] + after / base ** len(part)


def _inside(match: re.Match[str]) -> str:
    """Return the value in parentheses; without a value, the text with a ? that makes algebra refuse it."""
    based = read(match[0])
    if based is None or based.value is None:
        return match[0].replace("_", "?")
    value = based.value
    return f"({value.numerator})" if value.denominator == 1 else rf"(\frac{{{value.numerator}}}{{{value.denominator}}})"
