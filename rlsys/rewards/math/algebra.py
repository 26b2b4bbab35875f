"""Whether two expressions are the same: math-verify behind cheap limits. Sections 10 and 11 of docs/grading.md.

Model output is never executed: math-verify's plain-expression parser, which ends in `eval`, is not used, only its LaTeX
grammar. Its own timeouts are off, because they need SIGALRM and so the main thread; work that does not end is killed by
rlsys.rewards.grader_pool. What is known not to end is refused here, before anything reads it.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from fractions import Fraction

import sympy
from math_verify import LatexExtractionConfig, LatexNormalizationConfig, parse, verify

from rlsys.rewards.math.values import Value, rounds_to

MAX_POWER = 10_000  # an exponent
MAX_POWER_DIGITS = 20_000  # of the power of a number
MAX_INDEX = 1000  # of a root, and what a factorial or binomial is of
MAX_GROUP_POWER = 20  # of a bracket
MAX_NESTED_POWERS = 2
MAX_COSTLY = 8  # square roots, bars and functions together
MAX_DEPTH = 6
DIGITS = 50  # of numerical values
MANY_DIGITS = 10_000  # where there are no letters, so that one point decides: 2^{1000} and 2^{1000}-1 differ
GUARD = 10  # digits at the end that do not count
# Values that letters take: both signs, no special ratios.
POINTS = ((0.7310585786, 0.4142135), (-1.2193217, 0.61803398), (2.6457513, -0.3819660))

# Units and arguments without braces have been read before; what math-verify takes for units are letters here.
_SPELLED = LatexNormalizationConfig(units=False, malformed_operators=False)
_LATEX = [LatexExtractionConfig(boxed_match_priority=0, normalization_config=_SPELLED)]
# What the grammar does not know, or evaluates at once: to it, lcm(a,b) is ab, x \approx 3 is 3, and f|_{x=1} is f.
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
# Words, and a space that ends the name of a command or a number; any other space may be read as the one before a unit.
_SPACE = re.compile(r"(\\text\{[^{}]*\}|\\[A-Za-z]+ +(?=[A-Za-z])|[0-9] +(?=[0-9]))| +")
# Letters side by side that the grammar takes for a name: t times r is no trace.
_KEYWORD = re.compile(r"(?<!\\)(?<![A-Za-z])([A-Za-z]*?(?=tr|inf|and|or)[A-Za-z])([A-Za-z])")
# The grammar takes it for a transpose and leaves it out, of numbers and letters too: 2^T is not 2.
_POWER_T = re.compile(r"\^ ?(?:T|\{ ?T ?\})")
_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|[0-9.]+|.", re.DOTALL)

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its timeouts are off: they are, on purpose


def same_expression(found: str, wanted: str) -> bool:
    """Both spelled."""
    if not (affordable(found) and affordable(wanted)) or _primes(found) != _primes(wanted):
        return False
    found, wanted = _own_letters(found, wanted)
    if "gamma" in (found + wanted).lower():  # more letters than there are
        return False
    target, gold = _parse(found), _parse(wanted)
    if _are_multiples(target, gold):
        return True
    verdict = _by_numbers(target, gold)
    return bool(verify(gold, target, timeout_seconds=None)) if verdict is None else verdict


def same_as_value(expression: str, value: Value) -> bool:
    """Whether an expression is worth `value`, or rounds to it where that is a decimal long enough."""
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
    number = _at(first, {}, DIGITS + 50)
    if number is None or not number.is_real:
        return False
    as_fraction = sympy.Rational(number)
    return rounds_to(value, Fraction(int(as_fraction.p), int(as_fraction.q)))


def affordable(text: str) -> bool:
    """Whether reading and evaluating `text` is sure to be cheap."""
    if _UNREAD.search(text) or len(_COSTLY.findall(text)) > MAX_COSTLY:
        return False
    indices = re.findall(r"\\sqrt\[([^\]]*)\]|\\binom\{([^}]*)\}\{([^}]*)\}|([0-9]+)\s*!", text)
    if any(_worth(part) > MAX_INDEX for index in indices for part in index):
        return False
    if re.search(r"!\s*!|[})\]]\s*!", _FACTORIAL_OF_LETTERS.sub("", text)):
        return False
    return _powers_are_small(text)


def _powers_are_small(text: str) -> bool:
    """One pass: how deep powers of powers nest in each open bracket, and what each exponent is worth."""
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
            twice = tokens[at : at + 1] == ["^"]  # no LaTeX, and read as a tower
            digits = len(grouped[0]) if grouped and grouped[0][0].isdigit() else 0
            if digits * _worth("".join(exponent)) > MAX_POWER_DIGITS:
                return False
            if twice or powers > MAX_NESTED_POWERS or "!" in exponent or _worth("".join(exponent)) > limit:
                return False
            open_powers[-1] = max(open_powers[-1], powers)
            continue
        at += 1
    return True


def _exponent(tokens: list[str], at: int) -> tuple[list[str], int]:
    """The tokens of the exponent that starts at `at`, with its braces, and where it ends."""
    depth, start = 0, at
    while at < len(tokens):
        depth += (tokens[at] in "([{") - (tokens[at] in ")]}")
        at += 1
        if depth <= 0:
            break
    return tokens[start:at], at


def _worth(text: str) -> int:
    """An upper bound for what numbers in an exponent come to; powers within it count as such."""
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


def _own_letters(*texts: str) -> list[str]:
    """Letters that math-verify would misread, replaced: capitals beside their small letter, which are the same to it;
    gamma, a function to it, read in time that doubles with each; and d, which makes a differential of the next."""
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
    """The expression, its decimals exact."""
    first = next((e for e in expressions if isinstance(e, sympy.Expr)), None)
    return first and first.xreplace({number: sympy.Rational(str(number)) for number in first.atoms(sympy.Float)})


def _primes(text: str) -> Counter[str]:
    """How often each letter, number or bracket has primes, which math-verify does not see."""
    return Counter(match[0] for match in _PRIMED.finditer(text))


def _are_multiples(target: list[object], gold: list[object]) -> bool:
    """Whether both are equations, and one side less the other of the one is a constant times that of the other."""
    one, other = (_difference(expressions) for expressions in (target, gold))
    if one is None or other is None:
        return False
    names = sorted({symbol.name for symbol in one.free_symbols | other.free_symbols})
    if not names or "i" in names:
        return False
    ratios = []
    for start, step in POINTS:
        values = {
            symbol: sympy.Float(start + step * names.index(symbol.name), DIGITS)
            for symbol in one.free_symbols | other.free_symbols
        }
        a, b = _at(one, values, DIGITS), _at(other, values, DIGITS)
        if a is None or b is None or not (a.is_real and b.is_real) or a == 0 or b == 0:
            return False
        ratios.append(a / b)
    return not any(_differ(ratios[0], ratio, DIGITS) for ratio in ratios[1:])


def _difference(expressions: list[object]) -> sympy.Expr | None:
    first = expressions[0] if expressions else None
    if not isinstance(first, sympy.Eq) or not all(isinstance(side, sympy.Expr) for side in first.args):
        return None
    return _first([first.lhs - first.rhs])


def _by_numbers(target: list[object], gold: list[object]) -> bool | None:
    """What numerical values say of two expressions; None where they say nothing."""
    a, b = _first(target), _first(gold)
    if a is None or b is None or not isinstance(target[0], sympy.Expr) or not isinstance(gold[0], sympy.Expr):
        return None
    symbols = sorted(a.free_symbols | b.free_symbols, key=lambda symbol: symbol.name)
    names = sorted({symbol.name for symbol in symbols})
    imaginary = [symbol for symbol in symbols if symbol.name == "i"]  # math-verify knows i alone, and not the i of 2i
    complex_too = bool(imaginary) or a.has(sympy.I) or b.has(sympy.I)
    agreed = 0
    for start, step in POINTS:
        values = {symbol: sympy.Float(start + step * names.index(symbol.name), DIGITS) for symbol in symbols}
        values.update(dict.fromkeys(imaginary, sympy.I))
        one, other = _at(a, values, DIGITS), _at(b, values, DIGITS)
        if one is None or other is None or not (complex_too or (one.is_real and other.is_real)):
            continue
        if _differ(one, other, DIGITS):
            return False
        agreed += 1
        if len(names) == bool(imaginary):
            one, other = _at(a, values, MANY_DIGITS), _at(b, values, MANY_DIGITS)
            return None if one is None or other is None else not _differ(one, other, MANY_DIGITS)
    return True if agreed else None


def _differ(one: sympy.Expr, other: sympy.Expr, digits: int) -> bool:
    largest = max(abs(one), abs(other))
    return bool(
        largest > sympy.Float(10) ** -digits and abs(one - other) > largest * sympy.Float(10) ** (GUARD - digits)
    )


def _at(expression: sympy.Expr, values: dict[sympy.Symbol, sympy.Expr], digits: int) -> sympy.Expr | None:
    """The numerical value, real or complex; None where there is none."""
    try:
        number = expression.evalf(digits, subs=values, maxn=digits + 1000)
        parts = number.as_real_imag()
    except Exception:  # sympy raises whatever its functions raise on values out of their domain
        return None
    return number if all(part.is_Number and part.is_finite for part in parts) else None
