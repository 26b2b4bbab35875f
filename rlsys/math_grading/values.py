"""Parses exact values: decimals, fractions, mixed numbers, scientific notation, roots, pi and e.

Sections 3 and 4 of docs/grading.md. A value is c * r**(1/n) * constants. Sums, other products and powers are not
values: they are unfinished calculations. All numbers stay small, because the text is short and exponents of ten are
bounded.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from fractions import Fraction

MAX_EXPONENT = 1000  # largest exponent of ten
MAX_INDEX = 20  # largest index of a root
MIN_DECIMALS = 6  # decimals, and significant digits, that a rounded decimal needs to equal the exact number
MAX_DECIMALS = 60  # largest number of decimals that is compared with a root or a constant
CONSTANTS = {
    r"\pi": Fraction("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899"),
    "e": Fraction("2.71828182845904523536028747135266249775724709369995957496696762772407663035354759"),
}

_DIGITS = re.compile(r"[0-9]+")
_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]*)?|\.[0-9]+")
_REPEATING = re.compile(r"([0-9]*)\.([0-9]*)\\(?:overline|bar)\{([0-9]+)\}")
_MIXED = re.compile(r"\\frac\{([0-9]+)\}\{([0-9]+)\}")
_MIXED_LINE = re.compile(r"([+-]?)([0-9]+) ([0-9]+) ?/ ?([0-9]+)")
_POWER_OF_TEN = re.compile(r"10\^(?:\{([+-]?[0-9]{1,5})\}|([+-]?[0-9]{1,5}))(?![0-9])")
_TIMES = re.compile(r"\\times|\\cdot|\*")
_E_NOTATION = re.compile(r"[eE]([+-]?[0-9]{1,5})(?![0-9])")
_ROOT = re.compile(r"\\sqrt(?:\[([0-9]{1,2})\])?\{")
_CONSTANT = re.compile(r"\\pi(?![A-Za-z])|e(?![A-Za-z^0-9])")


@dataclass(frozen=True, slots=True)
class Value:
    """Exact value c * r**(1/n) * constants; r is 1 if the root is rational."""

    c: Fraction
    r: Fraction = Fraction(1)
    n: int = 1
    constants: tuple[str, ...] = ()
    decimals: int | None = None  # written decimals of a plain number (2.50 has 2); None for other notations

    @property
    def rational(self) -> bool:
        return self.r == 1 and not self.constants

    def times(self, factor: Fraction) -> Value:
        """Multiply by `factor`. Only 1/100 keeps `decimals`, increased by 2: it shifts the decimal point."""
        decimals = None if self.decimals is None or factor != Fraction(1, 100) else self.decimals + 2
        return replace(self, c=self.c * factor, decimals=decimals)


def read_value(text: str) -> Value | None:
    """Parse spelled text as a value; None if it is not a value."""
    mixed = _MIXED_LINE.fullmatch(text)
    if mixed:
        sign, whole, over, under = mixed.groups()
        return Value(int(sign + "1") * (int(whole) + Fraction(int(over), int(under)))) if int(under) else None
    if re.search(r"[0-9.] [0-9.]", text):
        return None
    try:
        return _Reader(text.replace(" ", "")).parse()
    except _NoValueError:
        return None


def same_value(a: Value, b: Value) -> bool:
    """Return whether two values are equal, exactly or after rounding.

    After rounding: one is a decimal with enough digits, the other has no finite decimal form and rounds to it.
    """
    return _exactly(a, b) or _rounds_to(a, b) or _rounds_to(b, a)


def rounds_to(decimal: Value, number: Fraction) -> bool:
    """Return whether `number` rounds to `decimal` at its written decimals, and `decimal` has enough digits."""
    if decimal.decimals is None or not MIN_DECIMALS <= decimal.decimals <= MAX_DECIMALS:
        return False
    unit = Fraction(1, 10**decimal.decimals)
    return abs(decimal.c) / unit >= 10 ** (MIN_DECIMALS - 1) and 2 * abs(decimal.c - number) <= unit


def approximate(value: Value) -> Fraction:
    """Return a rational approximation, accurate to at least 70 decimals."""
    scale = 10**80
    radicand = value.r.numerator * value.r.denominator ** (value.n - 1) * scale**value.n
    number = value.c * Fraction(_root(radicand, value.n), scale * value.r.denominator)
    for name in value.constants:
        number *= CONSTANTS[name]
    return number


class _NoValueError(Exception):
    pass


class _Reader:
    """Recursive-descent parser; the caller bounds the nesting depth of braces, and so of the recursion."""

    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0

    def parse(self) -> Value:
        value = self._quotient()
        if self._at != len(self._text):
            raise _NoValueError
        return value

    def _quotient(self) -> Value:
        start = self._at
        value = self._signed()
        if self._take("/") or self._take(r"\div"):
            return _divide(value, self._atom())
        return replace(value, decimals=_decimals(self._text[start : self._at]))

    def _signed(self) -> Value:
        negative = self._take("-")
        if not negative:
            self._take("+")
        value = self._product()
        return value.times(Fraction(-1)) if negative else value

    def _atom(self) -> Value:
        """Parse a denominator after a slash: a single number, root or constant, since more would be ambiguous."""
        number = self._match(_NUMBER)
        part = Value(Fraction(number[0])) if number else self._irrational()
        if part is None:
            raise _NoValueError
        return part

    def _product(self) -> Value:
        value = self._factor()
        while True:
            before = self._at
            if value is not None:
                self._match(_TIMES)
            part = self._irrational()
            if part is None:
                self._at = before
                break
            value = part if value is None else _multiply(value, part)
        if value is None:
            raise _NoValueError
        return value

    def _factor(self) -> Value | None:
        """Parse a number, a mixed number, a number times a power of ten, or a fraction."""
        power = self._match(_POWER_OF_TEN)
        if power:
            return Value(_ten(power[1] or power[2]))
        repeating = self._match(_REPEATING)
        if repeating:
            return Value(_repeating(*repeating.groups()))
        number = self._match(_NUMBER)
        if not number:
            return self._fraction()
        value = Fraction(number[0])
        mixed = self._match(_MIXED) if _DIGITS.fullmatch(number[0]) else None
        if mixed:
            if not int(mixed[2]):
                raise _NoValueError
            return Value(value + Fraction(int(mixed[1]), int(mixed[2])))
        notation = self._match(_E_NOTATION)
        if notation:
            return Value(value * _ten(notation[1]))
        before = self._at
        if self._match(_TIMES):
            power = self._match(_POWER_OF_TEN)
            if power:
                return Value(value * _ten(power[1] or power[2]))
            self._at = before
        return Value(value)

    def _fraction(self) -> Value | None:
        if not self._take(r"\frac{"):
            return None
        over = self._quotient()
        self._need("}{")
        under = self._quotient()
        self._need("}")
        return _divide(over, under)

    def _irrational(self) -> Value | None:
        constant = self._match(_CONSTANT)
        if constant:
            return Value(Fraction(1), constants=(constant[0],))
        root = self._match(_ROOT)
        if not root:
            return None
        under = self._quotient()
        self._need("}")
        n = int(root[1] or 2)
        if not (2 <= n <= MAX_INDEX and under.rational):
            raise _NoValueError
        return _nth_root(under.c, n)

    def _match(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        match = pattern.match(self._text, self._at)
        if match:
            self._at = match.end()
        return match

    def _take(self, text: str) -> bool:
        is_next = self._text.startswith(text, self._at)
        self._at += len(text) * is_next
        return is_next

    def _need(self, text: str) -> None:
        if not self._take(text):
            raise _NoValueError


def _ten(exponent: str) -> Fraction:
    if abs(int(exponent)) > MAX_EXPONENT:
        raise _NoValueError
    return Fraction(10) ** int(exponent)


def _repeating(whole: str, fixed: str, period: str) -> Fraction:
    tail = Fraction(int(period), 10 ** len(period) - 1)
    return int(whole or 0) + (int(fixed or 0) + tail) / Fraction(10 ** len(fixed))


def _decimals(text: str) -> int | None:
    """Return the number of decimals in a plain number; None for other text."""
    number = text.lstrip("+-")
    return len(number.partition(".")[2]) if _NUMBER.fullmatch(number) else None


def _multiply(a: Value, b: Value) -> Value:
    if (a.r != 1 and b.r != 1) or set(a.constants) & set(b.constants):
        raise _NoValueError
    r, n = (a.r, a.n) if a.r != 1 else (b.r, b.n)
    return Value(a.c * b.c, r, n, tuple(sorted(a.constants + b.constants)))


def _divide(a: Value, b: Value) -> Value:
    """Return a / b if the result has at most one root and no constant in the denominator."""
    if b.c == 0 or not set(b.constants) <= set(a.constants):
        raise _NoValueError
    n = math.lcm(a.n, b.n)
    if n > MAX_INDEX:
        raise _NoValueError
    root = _nth_root(a.r ** (n // a.n) / b.r ** (n // b.n), n)
    constants = tuple(name for name in a.constants if name not in b.constants)
    return Value(a.c / b.c * root.c, root.r, root.n, constants)


def _nth_root(radicand: Fraction, n: int) -> Value:
    """Return the n-th root, as a rational number if it is one."""
    if radicand < 0:
        if n % 2 == 0:
            raise _NoValueError
        return _nth_root(-radicand, n).times(Fraction(-1))
    over, under = _root(radicand.numerator, n), _root(radicand.denominator, n)
    if over**n == radicand.numerator and under**n == radicand.denominator:
        return Value(Fraction(over, under))
    return Value(Fraction(1), radicand, n)


def _root(number: int, n: int) -> int:
    """Return the largest integer whose n-th power is at most `number`, by Newton's method."""
    if n == 1 or number < 2:
        return number
    low = 1 << -(-number.bit_length() // n)  # starts above the root, so that every step decreases it
    while True:
        step = ((n - 1) * low + number // low ** (n - 1)) // n
        if step >= low:
            return low
        low = step


def _exactly(a: Value, b: Value) -> bool:
    if a.c == 0 or b.c == 0:
        return a.c == b.c
    if a.constants != b.constants or (a.c > 0) != (b.c > 0):
        return False
    n = math.lcm(a.n, b.n)
    return (a.c / b.c) ** n == b.r ** (n // b.n) / a.r ** (n // a.n)


def _rounds_to(decimal: Value, other: Value) -> bool:
    if decimal.decimals is None or not MIN_DECIMALS <= decimal.decimals <= MAX_DECIMALS:
        return False
    return not (other.rational and _terminates(other.c)) and rounds_to(decimal, approximate(other))


def _terminates(number: Fraction) -> bool:
    rest = number.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1
