"""Compares two expressions with math-verify, behind cheap cost limits. Sections 10 and 11 of docs/grading.md.

Model output is never executed: only math-verify's LaTeX grammar is used, not its parser for plain expressions, which
calls `eval`. math-verify's timeouts are disabled because they need SIGALRM and therefore the main thread;
rlsys.rewards.grader_pool kills calls that take too long. Expressions that are known to be too expensive are refused
here before they are parsed.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from fractions import Fraction

import sympy
from math_verify import LatexExtractionConfig, LatexNormalizationConfig, parse, verify

from rlsys.math_grading.values import Value, rounds_to

MAX_POWER = 10_000  # largest exponent
MAX_POWER_DIGITS = 20_000  # digits of the power of a number
MAX_INDEX = 1000  # largest index of a root, and argument of a factorial or binomial
MAX_GROUP_POWER = 20  # largest exponent of a bracketed expression
MAX_NESTED_POWERS = 2
MAX_COSTLY = 8  # roots, absolute-value bars and functions in total
MAX_DEPTH = 6  # nesting of brackets
DIGITS = 50  # of numerical values
MANY_DIGITS = 10_000  # without letters, when a single evaluation decides: 2^{1000} and 2^{1000}-1 must differ
GUARD = 10  # last digits that are ignored in comparisons
# Sample points (start, step): the i-th letter gets start + i * step. Both signs, no special ratios.
POINTS = ((0.7310585786, 0.4142135), (-1.2193217, 0.61803398), (2.6457513, -0.3819660))

# Units and arguments without braces were handled earlier; what math-verify would read as units are letters here.
_SPELLED = LatexNormalizationConfig(units=False, malformed_operators=False)
_LATEX = [LatexExtractionConfig(boxed_match_priority=0, normalization_config=_SPELLED)]
# Refused: commands that the grammar does not know, misreads or evaluates while parsing. It reads lcm(a,b) as ab,
# x \approx 3 as 3, and f|_{x=1} as f.
_UNREAD = re.compile(
    r"\\(?:sum|prod|int|iint|iiint|oint|lim|limsup|liminf|bigcup|bigcap|partial|begin|operatorname|gcd|lcm|coth|sech|csch"
    r"|approx|approxeq|sim|simeq|cong|doteq|propto)(?![a-z])|\|_|\bd/d"
    r"|\\frac\{d(?:\^[0-9n]|\^\{[^{}]*\})? ?[A-Za-z]?\}\{d ?[A-Za-z]|[?&#~]"
)
_COSTLY = re.compile(
    r"\\(?:sqrt|sin|cos|tan|cot|sec|csc|arc[a-z]+|sinh|cosh|tanh|log|ln|lg|exp|det|gcd|lcm|max|min)|\|"
)
_PRIMED = re.compile(r"""(?:[A-Za-z](?:_(?:.|\{[^{}]*\}))?|[0-9]+|[)\]}|])['"]+""")
_LETTER = re.compile(r"\\text\{[^{}]*\}|(\\[A-Za-z]+|[A-Za-z])")
_FACTORIAL_OF_LETTERS = re.compile(r"\([^()!^]*[a-zA-Z][^()!^]*\) ?!")
_NUMBER = re.compile(r"[0-9]+")
# Words, and spaces that end a command name or separate numbers, are kept. The grammar may read any other space as the
# one before a unit.
_SPACE = re.compile(r"(\\text\{[^{}]*\}|\\[A-Za-z]+ +(?=[A-Za-z])|[0-9] +(?=[0-9]))| +")
# Adjacent letters that the grammar reads as a keyword: t times r is not a trace.
_KEYWORD = re.compile(r"(?<!\\)(?<![A-Za-z])([A-Za-z]*?(?=tr|inf|and|or)[A-Za-z])([A-Za-z])")
# The grammar reads ^T as a transpose and drops it, even after numbers and letters: 2^T is not 2.
_POWER_T = re.compile(r"\^ ?(?:T|\{ ?T ?\})")
_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|[0-9.]+|.", re.DOTALL)

logging.getLogger("math_verify").setLevel(
    logging.ERROR
)  # hides the warning about disabled timeouts: they are disabled on purpose


def same_expression(prediction: str, reference: str) -> bool:
    """Return whether two expressions are equal; both must be spelled by ``spelling.spell``."""
    if not (affordable(prediction) and affordable(reference)) or _primes(prediction) != _primes(reference):
        return False
    prediction, reference = _replace_ambiguous_letters(prediction, reference)
    if "gamma" in (prediction + reference).lower():  # no spare letter was left to replace it
        return False
    target, gold = _parse(prediction), _parse(reference)
    if _are_multiples(target, gold):
        return True
    verdict = _by_numbers(target, gold)
    return bool(verify(gold, target, timeout_seconds=None)) if verdict is None else verdict


def same_as_value(expression: str, value: Value) -> bool:
    """Return whether an expression equals `value`, or rounds to it if `value` is a decimal with enough digits."""
    if not affordable(expression) or _primes(expression) or "gamma" in expression.lower():
        return False
    first = _first(_parse(expression))
    if first is None or first.free_symbols:
        return False
    exact = sympy.Rational(value.c.numerator, value.c.denominator)
    exact *= sympy.Rational(value.r.numerator, value.r.denominator) ** sympy.Rational(1, value.n)
    for name in value.constants:
        exact *= {r"\pi": sympy.pi, "e": sympy.E}[name]
    if _by_numbers([first], [exact]):
        return True
    number = _numeric(first, {}, DIGITS + 50)
    if number is None or not number.is_real:
        return False
    as_fraction = sympy.Rational(number)
    return rounds_to(value, Fraction(int(as_fraction.p), int(as_fraction.q)))


def affordable(text: str) -> bool:
    """Return whether parsing and evaluating `text` is guaranteed to be cheap."""
    if _UNREAD.search(text) or len(_COSTLY.findall(text)) > MAX_COSTLY:
        return False
    indices = re.findall(r"\\sqrt\[([^\]]*)\]|\\binom\{([^}]*)\}\{([^}]*)\}|([0-9]+)\s*!", text)
    if any(_upper_bound(part) > MAX_INDEX for index in indices for part in index):
        return False
    if re.search(r"!\s*!|[})\]]\s*!", _FACTORIAL_OF_LETTERS.sub("", text)):
        return False
    return _powers_are_small(text)


def _powers_are_small(text: str) -> bool:
    """Check the nesting of powers in each open bracket and an upper bound of each exponent, in one pass."""
    tokens = [match[0] for match in _TOKEN.finditer(text) if not match[0].isspace()]
    open_powers, depth, last_group = [0], 0, 0
    at = 0
    while at < len(tokens):
        token = tokens[at]
        if token in "([{":
            open_powers.append(0)
            depth += 1
            if depth > MAX_DEPTH:
                return False
        elif token in ")]}" and len(open_powers) > 1:
            last_group = open_powers.pop()
            depth -= 1
            open_powers[-1] = max(open_powers[-1], last_group)
        elif token == "^":
            exponent, at = _exponent(tokens, at + 1)
            grouped = tokens[at - len(exponent) - 2 : at - len(exponent) - 1][:1]
            powers = 1 + exponent.count("^") + (last_group if grouped and grouped[0] in ")]}" else 0)
            limit = MAX_GROUP_POWER if grouped and grouped[0] in ")]}" else MAX_POWER
            twice = tokens[at : at + 1] == ["^"]  # x^2^3 is not valid LaTeX, but the grammar reads it as a tower
            digits = len(grouped[0]) if grouped and grouped[0][0].isdigit() else 0
            if digits * _upper_bound("".join(exponent)) > MAX_POWER_DIGITS:
                return False
            if twice or powers > MAX_NESTED_POWERS or "!" in exponent or _upper_bound("".join(exponent)) > limit:
                return False
            open_powers[-1] = max(open_powers[-1], powers)
            continue
        at += 1
    return True


def _exponent(tokens: list[str], at: int) -> tuple[list[str], int]:
    """Return the tokens of the exponent that starts at `at`, including its braces, and the index after it."""
    depth, start = 0, at
    while at < len(tokens):
        depth += (tokens[at] in "([{") - (tokens[at] in ")]}")
        at += 1
        if depth <= 0:
            break
    return tokens[start:at], at


def _upper_bound(text: str) -> int:
    """Return an upper bound of an exponent's value: the product of its numbers, with an inner power evaluated."""
    total = 1
    power = re.search(r"([0-9]+)\s*\}?\s*\^\s*\{?\s*([0-9]+)", text)
    if power:
        if len(power[1]) > 4 or len(power[2]) > 2:
            return MAX_POWER + 1
        total = int(power[1]) ** int(power[2])
        text = text[: power.start()] + text[power.end() :]
    for number in _NUMBER.findall(text):
        total *= max(1, int(number[:8]) if len(number) > 8 else int(number))
        if total > MAX_POWER:
            break
    return total


def _replace_ambiguous_letters(*texts: str) -> list[str]:
    """Replace letters that math-verify would misread by letters that do not occur.

    Capitals that occur beside their small letter, because math-verify treats both as the same; gamma, which it reads as
    a function, in time that doubles with each occurrence; and d, which turns the next letter into a differential.
    """
    letters = {match[1] for text in texts for match in _LETTER.finditer(text) if match[1]}
    spare = sorted(set("abchjklmnopqrstuvwxyz") - {letter.lower() for letter in letters})
    ambiguous = sorted(
        letter
        for letter in letters
        if letter.lower() == r"\gamma" or letter == "d" or (letter != letter.lower() and letter.lower() in letters)
    )
    names = {letter: f" {new} " for letter, new in zip(ambiguous, spare, strict=False)}
    return [_LETTER.sub(lambda match: names.get(match[0], match[0]), text) for text in texts]


def _parse(text: str) -> list[object]:
    text = _POWER_T.sub("^{(T)}", _KEYWORD.sub(r"\1{\2}", _SPACE.sub(r"\1", text.strip())))
    expressions: list[object] = parse(rf"\boxed{{{text}}}", _LATEX, parsing_timeout=None)
    return expressions


def _first(expressions: list[object]) -> sympy.Expr | None:
    """Return the first parsed expression with its decimals as exact rationals; None without one."""
    first = next((e for e in expressions if isinstance(e, sympy.Expr)), None)
    return first and first.xreplace({number: sympy.Rational(str(number)) for number in first.atoms(sympy.Float)})


def _primes(text: str) -> Counter[str]:
    """Count primes (f', x'') after each letter, number or bracket: math-verify ignores them."""
    return Counter(match[0] for match in _PRIMED.finditer(text))


def _are_multiples(target: list[object], gold: list[object]) -> bool:
    """Return whether both are equations, and left minus right side of one is a constant multiple of the other's."""
    left, right = (_difference(expressions) for expressions in (target, gold))
    if left is None or right is None:
        return False
    names = sorted({symbol.name for symbol in left.free_symbols | right.free_symbols})
    if not names or "i" in names:
        return False
    ratios = []
    for start, step in POINTS:
        values = {
            symbol: sympy.Float(start + step * names.index(symbol.name), DIGITS)
            for symbol in left.free_symbols | right.free_symbols
        }
        a, b = _numeric(left, values, DIGITS), _numeric(right, values, DIGITS)
        if a is None or b is None or not (a.is_real and b.is_real) or a == 0 or b == 0:
            return False
        ratios.append(a / b)
    return not any(_differ(ratios[0], ratio, DIGITS) for ratio in ratios[1:])


def _difference(expressions: list[object]) -> sympy.Expr | None:
    """Return left minus right side of an equation; None if the expression is not an equation."""
    first = expressions[0] if expressions else None
    if not isinstance(first, sympy.Eq) or not all(isinstance(side, sympy.Expr) for side in first.args):
        return None
    return _first([first.lhs - first.rhs])


def _by_numbers(target: list[object], gold: list[object]) -> bool | None:
    """Compare two expressions by their numerical values at sample points; None if that decides nothing."""
    a, b = _first(target), _first(gold)
    if a is None or b is None or not isinstance(target[0], sympy.Expr) or not isinstance(gold[0], sympy.Expr):
        return None
    symbols = sorted(a.free_symbols | b.free_symbols, key=lambda symbol: symbol.name)
    names = sorted({symbol.name for symbol in symbols})
    imaginary = [symbol for symbol in symbols if symbol.name == "i"]  # math-verify recognizes a lone i, but not in 2i
    complex_too = bool(imaginary) or a.has(sympy.I) or b.has(sympy.I)
    agreed = 0
    for start, step in POINTS:
        values = {symbol: sympy.Float(start + step * names.index(symbol.name), DIGITS) for symbol in symbols}
        values.update(dict.fromkeys(imaginary, sympy.I))
        left, right = _numeric(a, values, DIGITS), _numeric(b, values, DIGITS)
        if left is None or right is None or not (complex_too or (left.is_real and right.is_real)):
            continue
        if _differ(left, right, DIGITS):
            return False
        agreed += 1
        if len(names) == bool(imaginary):
            if a == b:  # the same tree, which is finite: digits beyond these cannot differ
                return True
            left, right = _numeric(a, values, MANY_DIGITS), _numeric(b, values, MANY_DIGITS)
            return None if left is None or right is None else not _differ(left, right, MANY_DIGITS)
    return True if agreed else None


def _differ(left: sympy.Expr, right: sympy.Expr, digits: int) -> bool:
    largest = max(abs(left), abs(right))
    return bool(
        largest > sympy.Float(10) ** -digits and abs(left - right) > largest * sympy.Float(10) ** (GUARD - digits)
    )


def _numeric(expression: sympy.Expr, values: dict[sympy.Symbol, sympy.Expr], digits: int) -> sympy.Expr | None:
    """Return the numerical value, real or complex, to `digits` digits; None if it is not finite or undefined."""
    try:
        number = expression.evalf(digits, subs=values, maxn=digits + 1000)
        parts = number.as_real_imag()
    except Exception:  # sympy's functions raise many types for values outside their domain
        return None
    return number if all(part.is_Number and part.is_finite for part in parts) else None
