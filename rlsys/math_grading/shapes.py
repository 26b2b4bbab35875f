"""Parses an answer into its shape: expression, list, set, interval, union, matrix or equation.

Sections 7 and 8 of docs/grading.md.

    x \\in (1, 2] \\cup \\{3\\}   ->   union named x of "(]" [1, 2] and set [3]
    1 < x \\le 2               ->   "(]" named x [1, 2]
    \\pm 2                     ->   list [2, -2]

Text that has none of these forms is a leaf. Text with unbalanced brackets is malformed, and equals only the same text.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from rlsys.math_grading.spelling import key

ORDERED = ("()", "[]", "(]", "[)", "<>", "matrix", "row")  # kinds whose parts are compared in order


@dataclass(frozen=True, slots=True)
class Shape:
    """Parsed answer; `kind` is leaf, equation, malformed, list, set, union or one of ORDERED."""

    kind: str
    text: str
    parts: tuple[Shape, ...] = ()
    name: str = ""  # the unknown that the answer gives the value or values of: x in x = 2 and in 1 < x
    equation: str = ""  # the full equation, if `text` is only its last side


class _Token(NamedTuple):
    text: str
    start: int
    end: int


_TOKEN = re.compile(r"\\begin\{[a-zA-Z*]+\}|\\end\{[a-zA-Z*]+\}|\\[A-Za-z]+|\\.|[A-Za-z]+|.", re.DOTALL)
_OPEN = {"(": "(", "[": "(", "{": "{", r"\{": r"\{", r"\langle": "<", r"\lfloor": "f", r"\lceil": "c"}
_CLOSE = {")": "(", "]": "(", "}": "{", r"\}": r"\{", r"\rangle": "<", r"\rfloor": "f", r"\rceil": "c"}
_THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?!,?[0-9])")
_LETTERS = r"(?:\\?[A-Za-z]+|\\text\{[A-Za-z .]+\})"
_INDEX = r"(?:_(?:[0-9A-Za-z]|\{[0-9A-Za-z,]+\}))?"
_POINT = r"\([A-Za-z](?:,[A-Za-z])+\)"
_OPERATOR_OF = r"(?:\\text\{[A-Za-z]+\}|\\(?:deg|dim|det|arg) ?)[A-Za-z]"
_NAME = re.compile(
    rf"{_OPERATOR_OF}|(?:m?\\angle )?{_LETTERS}(?:\^\{{-1\}})?{_INDEX}'?(?:\([A-Za-z](?:,[A-Za-z])*\))?|{_POINT}"
)
_UNKNOWN = re.compile(r"\\?[A-Za-z]+(?:_(?:[0-9A-Za-z]|\{[0-9A-Za-z]+\}))?")
_NO_NAMES = (r"\pi", r"\infty", "e", "i", r"\frac", r"\sqrt")
_NOT_LETTERS = re.compile(
    r"\\text\{[^{}]*\}|\\(?:pi|infty|cdot|times|frac|sqrt|circ)(?![A-Za-z])|[0-9] [mgshlL](?![A-Za-z])"
)
_UNKNOWN_LETTER = re.compile(
    r"(?<![A-Za-z\\])(?![ei](?![A-Za-z]))[A-Za-z](?![A-Za-z])|\\(?:[a-z]*eta|alpha|gamma|lambda|mu)(?![A-Za-z])"
)
_LESS, _GREATER = (
    {"<": True, r"\le": False},
    {">": True, r"\ge": False},
)  # sign -> whether that end of the interval is open
_MATRIX = re.compile(r"\\begin\{([pb])matrix\}(.*)\\end\{\1matrix\}", re.DOTALL)
_QUOTED = re.compile(r"\\text\{([^{}]*[0-9][^{}]*)\}")  # with a digit, so not only words
_BOTH_SIGNS = re.compile(r"\\(?:pm|mp)(?![A-Za-z])")
_INFINITY = r"\infty"


def read(text: str) -> Shape:
    """Parse spelled text; the caller bounds the nesting depth of brackets, and so of the recursion."""
    return _read(_drop_thousands(text))


def _read(text: str) -> Shape:
    text = text.strip()
    quoted = _QUOTED.fullmatch(text)
    text = quoted[1].strip() if quoted else text
    tokens = _top(text)
    if tokens is None or not text:
        return Shape("malformed", text)
    parts = _split(text, tokens, (",", ";", "and", "or"))
    if len(parts) > 1:
        return _list(text, parts, any(token.text == "or" for token in tokens))
    signs = [token.text for token in tokens if token.text in {"=", r"\in", r"\ne", *_LESS, *_GREATER}]
    if signs:
        return _relation(text, _split(text, tokens, {*signs}), signs)
    parts = _split(text, tokens, (r"\cup",))
    if len(parts) > 1:
        return Shape("union", text, tuple(_read(part) for part in parts))
    matrix = _MATRIX.fullmatch(text)
    if matrix:
        return _matrix(text, matrix[2])
    if len(tokens) == 2 and tokens[0].start == 0 and tokens[1].end == len(text) and tokens[0].text in _OPEN:
        return _bracket(text, tokens)
    if text == r"\mathbb{R}":
        return _interval(text, "()", "-" + _INFINITY, _INFINITY)
    if text == r"\emptyset":
        return Shape("set", text)
    return _leaf(text)


def _top(text: str) -> list[_Token] | None:
    """Return the tokens outside of brackets, and the outermost brackets; None if brackets do not match."""
    stack: list[str] = []
    top = []
    for match in _TOKEN.finditer(text):
        token = match[0]
        closes = "b" if token.startswith(r"\end{") else _CLOSE.get(token)
        if closes is not None and (not stack or stack.pop() != closes):
            return None
        if not stack:
            top.append(_Token(token, *match.span()))
        opens = "b" if token.startswith(r"\begin{") else _OPEN.get(token)
        if opens is not None:
            stack.append(opens)
    return None if stack else top


def _split(text: str, tokens: Sequence[_Token], separators: Collection[str]) -> list[str]:
    at, parts = 0, []
    for token in tokens:
        if token.text in separators:
            parts.append(text[at : token.start].strip())
            at = token.end
    return [*parts, text[at:].strip()]


def _list(text: str, parts: Sequence[str], alternatives: bool) -> Shape:
    if len(parts) > 2 and not parts[-2]:  # the comma before "and"
        parts = [*parts[:-2], parts[-1]]
    if not all(parts):
        return Shape("malformed", text)
    shapes = tuple(_read(part) for part in parts)
    names = {shape.name for shape in shapes}
    if alternatives and len(names) == 1 and names != {""} and all(shape.kind in ORDERED for shape in shapes):
        return Shape("union", text, tuple(replace(shape, name="") for shape in shapes), names.pop())
    flat = [part for shape in shapes for part in (shape.parts if shape.kind == "list" and not shape.name else (shape,))]
    return Shape("list", text, tuple(flat))


def _relation(text: str, sides: Sequence[str], signs: Sequence[str]) -> Shape:
    if not all(sides):
        return Shape("malformed", text)
    if {*signs} == {"="}:
        return _equation(text, sides)
    if signs == [r"\in"] and _unknown(sides[0]):
        return replace(_read(sides[1]), name=key(sides[0]))
    if signs == [r"\ne"] and _unknown(sides[0]):
        halves = ("-" + _INFINITY, sides[1]), (sides[1], _INFINITY)
        return Shape("union", text, tuple(_interval(text, "()", low, high) for low, high in halves), key(sides[0]))
    return _inequality(text, sides, signs) or Shape("equation", text, equation=text)


def _equation(text: str, sides: Sequence[str]) -> Shape:
    left, last = sides[0], sides[-1]
    if _NAME.fullmatch(key(left)) and left not in _NO_NAMES:
        value = _read(last)
        return value if value.kind == "malformed" else replace(value, name=key(left), equation=text)
    if _UNKNOWN_LETTER.search(_NOT_LETTERS.sub(" ", left)):
        return Shape("equation", text, equation=text)
    if len(sides) == 2 and _NAME.fullmatch(key(last)) and last not in _NO_NAMES and not last.startswith(r"\text"):
        return _equation(text, [last, left])
    if len(sides) == 2 and _UNKNOWN_LETTER.search(_NOT_LETTERS.sub(" ", last)):
        return Shape("equation", text, equation=text)
    return _read(last)


def _inequality(text: str, sides: Sequence[str], signs: Sequence[str]) -> Shape | None:
    """Return the interval that an inequality describes; None unless the unknown is by itself on exactly one side."""
    if not ({*signs} <= {*_LESS} or {*signs} <= {*_GREATER}) or len(sides) > 3:
        return None
    if signs[0] in _GREATER:
        sides, signs = sides[::-1], signs[::-1]
    is_open = [{**_LESS, **_GREATER}[sign] for sign in signs]
    if len(sides) == 3:
        low, unknown, high = sides
        kind = "[("[is_open[0]] + "])"[is_open[1]]
    elif _unknown(sides[0]):
        unknown, low, high = sides[0], "-" + _INFINITY, sides[1]
        kind = "(" + "])"[is_open[0]]
        if _unknown(high):
            return None
    else:
        low, unknown, high = sides[0], sides[1], _INFINITY
        kind = "[("[is_open[0]] + ")"
    return replace(_interval(text, kind, low, high), name=key(unknown)) if _unknown(unknown) else None


def _unknown(text: str) -> bool:
    return bool(_UNKNOWN.fullmatch(key(text))) and text not in _NO_NAMES


def _interval(text: str, kind: str, low: str, high: str) -> Shape:
    return Shape(kind, text, (_read(low), _read(high)))


def _bracket(text: str, tokens: Sequence[_Token]) -> Shape:
    opening, closing = tokens[0].text, tokens[1].text
    inside = text[tokens[0].end : tokens[1].start]
    if opening == r"\{":
        return _set(text, inside)
    if opening == "{":
        return _read(inside)
    if opening in (r"\lfloor", r"\lceil"):
        return _leaf(text)
    kind = "<>" if opening == r"\langle" else opening + closing
    within = _top(inside)
    parts = [] if within is None else _split(inside, within, (",", ";"))
    if not parts or not all(parts):
        return Shape("malformed", text)
    if kind == "()" and len(parts) == 1:
        return _read(parts[0])
    return Shape(kind, text, tuple(_read(part) for part in parts))


def _set(text: str, inside: str) -> Shape:
    if not inside.strip():
        return Shape("set", text)
    within = _top(inside)
    if within is None:
        return Shape("malformed", text)
    condition = _split(inside, within, (":", "|", r"\mid"))
    if len(condition) == 2:
        solved = _read(condition[1])
        named = solved.name and solved.name == key(condition[0]).partition(r"\in")[0].strip()
        return replace(solved, name="") if named else Shape("leaf", text)
    parts = _split(inside, within, (",", ";"))
    return replace(_list(text, parts, False), kind="set") if all(parts) else Shape("malformed", text)


def _matrix(text: str, inside: str) -> Shape:
    tokens = _top(inside)
    if tokens is None:
        return Shape("malformed", text)
    lines = _split(inside, tokens, (r"\\",))
    if not lines[-1]:
        lines.pop()
    rows = []
    for line in lines:
        cells = _split(line, _top(line) or (), ("&",))
        rows.append(Shape("row", line, tuple(_read(cell) for cell in cells)))
    return Shape("matrix", text, tuple(rows))


def _leaf(text: str) -> Shape:
    signs = list(_BOTH_SIGNS.finditer(text))
    if len(signs) != 1:
        return Shape("leaf", text)
    before, after = text[: signs[0].start()].strip(), text[signs[0].end() :].strip()
    plus = "" if not before or before[-1] in "({[" else "+"
    both = [before + plus + after, before + "-" + after]
    return Shape("list", text, tuple(_read(signed) for signed in (both if signs[0][0] == r"\pm" else both[::-1])))


def _drop_thousands(text: str) -> str:
    """Remove commas between groups of three digits, except inside brackets, where commas separate elements."""
    at, depth, pieces = 0, 0, []
    for match in _THOUSANDS.finditer(text):
        depth += sum((c in "([") - (c in ")]") for c in text[at : match.start()])
        depth += sum((text.count(sign, at, match.start())) * side for sign, side in ((r"\{", 1), (r"\}", -1)))
        pieces += [text[at : match.start()], match[0] if depth > 0 else match[0].replace(",", "")]
        at = match.end()
    return "".join([*pieces, text[at:]])
