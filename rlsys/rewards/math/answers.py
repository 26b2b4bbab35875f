"""Is this completion's final answer the right one? The rules are in docs/grading.md.

Answers are spelled alike, taken apart into shapes, and compared part by part: numbers by their exact value, words as
words, and what is left by math-verify. A reference that is a number never gets there, so that neither its speed nor its
opinion matters for it. Nothing that a model wrote is executed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rlsys.rewards.math import algebra, number_bases
from rlsys.rewards.math.extraction import extract, plain_number
from rlsys.rewards.math.shapes import ORDERED, Shape, read
from rlsys.rewards.math.spelling import key, spell
from rlsys.rewards.math.units import read_quantity, same_quantity, same_units
from rlsys.rewards.math.words import as_text, same_words

# Longer answers are wrong unread, unless they are the same text. GSM8K's longest is 11 characters.
MAX_ANSWER_CHARS = 256
MAX_ANSWER_DEPTH = 8  # the same for brackets in each other
MAX_UNMATCHED = 8  # of a list: expressions to be compared each with each


def grade(completion: str, answer: str) -> float:
    """1 if the completion's final answer equals `answer`, else 0.

    Raises:
        ValueError: the reference answer is empty, so no completion could be right.
    """
    in_reference = extract(answer)
    wanted = spell(answer if in_reference is None else in_reference)
    if not wanted:
        raise ValueError(f"the reference answer {answer[:80]!r} is empty")
    found = extract(completion)
    return 0.0 if found is None else float(_equal(spell(found), wanted))


def equal(found: str, wanted: str) -> bool:
    """Whether two extracted answers are equal."""
    return _equal(spell(found), spell(wanted))


def _equal(found: str, wanted: str) -> bool:
    if key(found) == key(wanted):
        return found != ""
    a, b = plain_number(found), plain_number(wanted)
    if a is not None and b is not None:
        return a == b
    if any(len(text) > MAX_ANSWER_CHARS or _depth(text) > MAX_ANSWER_DEPTH for text in (found, wanted)):
        return False
    return _same(read(found), read(wanted))


def _same(found: Shape, wanted: Shape) -> bool:
    if "malformed" in (found.kind, wanted.kind):
        return False
    if (found.name and wanted.name and found.name != wanted.name) or "equation" in (found.kind, wanted.kind):
        return _same_equation(found, wanted)
    kinds = {found.kind, wanted.kind}
    if kinds & {"list", "set"}:
        return _same_elements(_elements(found), _elements(wanted), as_sets="set" in kinds)
    if found.kind != wanted.kind:
        return False
    if found.kind == "union":
        return _same_elements(found.parts, wanted.parts, as_sets=False)
    if found.kind in ORDERED:
        return len(found.parts) == len(wanted.parts) and all(map(_same, found.parts, wanted.parts))
    return _same_leaf(found.text, wanted.text)


def _same_equation(found: Shape, wanted: Shape) -> bool:
    """Equations as they were written, not only their right sides."""
    a, b = found.equation, wanted.equation
    return bool(a and b) and algebra.same_expression(number_bases.decimal(a), number_bases.decimal(b))


def _elements(shape: Shape) -> Sequence[Shape]:
    return shape.parts if shape.kind in ("list", "set") else (shape,)


def _same_elements(found: Sequence[Shape], wanted: Sequence[Shape], as_sets: bool) -> bool:
    """Sets: each has an equal one on the other side. Lists: they can be paired off."""
    if not as_sets and len(found) != len(wanted):
        return False
    a, b = _without_same_text(found, wanted, as_sets), _without_same_text(wanted, found, as_sets)
    if max(len(a), len(b)) > MAX_UNMATCHED and not all(map(_is_value, (*a, *b))):
        return False
    if as_sets:
        return all(any(_same(f, w) for w in wanted) for f in a) and all(any(_same(f, w) for f in found) for w in b)
    for element in a:
        match = next((index for index, other in enumerate(b) if _same(element, other)), None)
        if match is None:
            return False
        del b[match]
    return not b


def _without_same_text(shapes: Sequence[Shape], others: Sequence[Shape], as_sets: bool) -> list[Shape]:
    texts = Counter((shape.name, key(shape.text)) for shape in others)
    rest = []
    for shape in shapes:
        text = (shape.name, key(shape.text))
        if texts[text] > 0 and shape.kind != "malformed":
            texts[text] -= not as_sets
        else:
            rest.append(shape)
    return rest


def _is_value(shape: Shape) -> bool:
    return shape.kind == "leaf" and read_quantity(shape.text).value is not None


def _same_leaf(found: str, wanted: str) -> bool:
    if key(found) == key(wanted):
        return True
    based = number_bases.same(found, wanted)
    if based is not None:
        return based
    found, wanted = number_bases.decimal(found), number_bases.decimal(wanted)
    a, b = read_quantity(found), read_quantity(wanted)
    if b.value is not None and (b.value.rational or a.value is not None):
        return a.value is not None and same_quantity(a, b)
    words = same_words(a.core, b.core)
    if words is not None:
        return words
    if ":" in found + wanted:  # a ratio or a time, with am and pm
        return as_text(found) == as_text(wanted)
    if a.percent != b.percent or not same_units(a, b) or r"\infty" in found + wanted:
        return False
    if a.value is not None:
        return algebra.same_as_value(b.core, a.value)
    if b.value is not None:
        return algebra.same_as_value(a.core, b.value)
    return algebra.same_expression(a.core, b.core)


def _depth(text: str) -> int:
    """How deep brackets of any kind nest, or how many stay open."""
    deepest = depth = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest
