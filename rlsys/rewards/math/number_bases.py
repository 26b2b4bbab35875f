"""Numbers in other bases. Section 3 of docs/grading.md.

    52_7, 1101_{\\text{two}}, 1A_{16}, 52 (base 7)

A number in another base is its value and its base, and equals only what has both. One in base ten is a plain number,
and a number without a base is in base ten.
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
    """`value` is None where the base is a letter or a digit is too large for it; then the digits are compared."""

    digits: str
    base: int | str
    value: Fraction | None
    lower: bool  # letters are among the digits, in lower case: they may also be unknowns


def same(found: str, wanted: str) -> bool | None:
    """Whether two spelled texts are the same number in the same base; None where neither has another base than ten."""
    if "_" not in found + wanted and "base" not in found + wanted:
        return None
    a, b = read(found), read(wanted)
    if a is not None and b is not None and a.lower and b.lower:
        return None
    a, b = (None if one is not None and one.lower and other is None else one for one, other in ((a, b), (b, a)))
    if (a is None or a.base == 10) and (b is None or b.base == 10):
        return None
    if a is None or b is None or a.base != b.base:
        return False
    return a.digits == b.digits if a.value is None or b.value is None else a.value == b.value


def decimal(text: str) -> str:
    """`text` without the mark of base ten, and numbers in other bases within an expression by their values."""
    whole = read(text)
    if whole is not None and whole.base == 10 and not whole.lower and whole.value is not None:
        return whole.digits
    return _WITHIN.sub(_inside, text) if "_" in text else text


def read(text: str) -> Based | None:
    """The number in a base that `text` is as a whole."""
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
        return None  # a name with an index
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
    """The value in parentheses; the text itself, with a sign that no grammar reads, where it has none."""
    based = read(match[0])
    if based is None or based.value is None:
        return match[0].replace("_", "?")
    value = based.value
    return f"({value.numerator})" if value.denominator == 1 else rf"(\frac{{{value.numerator}}}{{{value.denominator}}})"
