"""Compares the final answer of a completion with the reference answer, by the rules of docs/grading.md.

Both answers are normalized to one spelling, parsed into shapes (list, interval, matrix, ...) and compared part by part:
numbers by exact value, words as words, all other expressions with math-verify. A reference that is a number is compared
without math-verify, so neither its speed nor its verdicts matter for it. No text of the model is executed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rlsys.math_grading import algebra, number_bases
from rlsys.math_grading.extraction import extract, plain_number
from rlsys.math_grading.shapes import ORDERED, Shape, read
from rlsys.math_grading.spelling import key, spell
from rlsys.math_grading.units import read_quantity, same_quantity, same_units
from rlsys.math_grading.words import as_text, same_words

# A longer answer is wrong unless its text equals the reference; it is not parsed. GSM8K's longest has 11 characters.
MAX_ANSWER_CHARS = 256
MAX_ANSWER_DEPTH = 8  # same rule for the nesting depth of brackets
MAX_UNMATCHED = 8  # elements of a list or set that are compared pairwise; more must all be values


def grade(completion: str, answer: str) -> float:
    """Return 1 if the completion's final answer equals the reference `answer`, else 0.

    Raises:
        ValueError: the reference answer is empty, so no completion can be correct.
    """
    in_reference = extract(answer)
    reference = spell(answer if in_reference is None else in_reference)
    if not reference:
        raise ValueError(f"the reference answer {answer[:80]!r} is empty")
    final_answer = extract(completion)
    return 0.0 if final_answer is None else float(_equal(spell(final_answer), reference))


def equal(prediction: str, reference: str) -> bool:
    """Return whether two extracted answers are equal; `prediction` is the model's answer."""
    return _equal(spell(prediction), spell(reference))


def _equal(prediction: str, reference: str) -> bool:
    if key(prediction) == key(reference):
        return prediction != ""
    a, b = plain_number(prediction), plain_number(reference)
    if a is not None and b is not None:
        return a == b
    if any(len(text) > MAX_ANSWER_CHARS or _depth(text) > MAX_ANSWER_DEPTH for text in (prediction, reference)):
        return False
    return _same(read(prediction), read(reference))


def _same(prediction: Shape, reference: Shape) -> bool:
    if "malformed" in (prediction.kind, reference.kind):
        return False
    kinds = {prediction.kind, reference.kind}
    names_differ = prediction.name and reference.name and prediction.name != reference.name
    if names_differ or "equation" in kinds:
        return _same_equation(prediction, reference)
    if kinds & {"list", "set"}:
        return _same_elements(_elements(prediction), _elements(reference), as_sets="set" in kinds)
    if prediction.kind != reference.kind:
        return False
    if prediction.kind == "union":
        return _same_elements(prediction.parts, reference.parts, as_sets=False)
    if prediction.kind in ORDERED:
        return len(prediction.parts) == len(reference.parts) and all(map(_same, prediction.parts, reference.parts))
    return _same_leaf(prediction.text, reference.text)


def _same_equation(prediction: Shape, reference: Shape) -> bool:
    """Compare two equations as a unit, both sides, not only their right sides."""
    a, b = prediction.equation, reference.equation
    return bool(a and b) and algebra.same_expression(number_bases.decimal(a), number_bases.decimal(b))


def _elements(shape: Shape) -> Sequence[Shape]:
    return shape.parts if shape.kind in ("list", "set") else (shape,)


def _same_elements(prediction: Sequence[Shape], reference: Sequence[Shape], as_sets: bool) -> bool:
    """Compare elements in any order. Sets: each element has an equal on the other side. Lists: a one-to-one match."""
    if not as_sets and len(prediction) != len(reference):
        return False
    a, b = _without_same_text(prediction, reference, as_sets), _without_same_text(reference, prediction, as_sets)
    if max(len(a), len(b)) > MAX_UNMATCHED and not all(map(_is_value, (*a, *b))):
        return False
    if as_sets:
        return all(any(_same(p, r) for r in reference) for p in a) and all(
            any(_same(p, r) for p in prediction) for r in b
        )
    for element in a:
        match = next((index for index, other in enumerate(b) if _same(element, other)), None)
        if match is None:
            return False
        del b[match]
    return not b


def _without_same_text(shapes: Sequence[Shape], others: Sequence[Shape], as_sets: bool) -> list[Shape]:
    """Return the shapes that have no counterpart with the same text in `others`; a list uses up each counterpart."""
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


def _same_leaf(prediction: str, reference: str) -> bool:
    if key(prediction) == key(reference):
        return True
    based = number_bases.same(prediction, reference)
    if based is not None:
        return based
    prediction, reference = number_bases.decimal(prediction), number_bases.decimal(reference)
    a, b = read_quantity(prediction), read_quantity(reference)
    if b.value is not None and (b.value.rational or a.value is not None):
        return a.value is not None and same_quantity(a, b)
    words = same_words(a.core, b.core)
    if words is not None:
        return words
    if ":" in prediction + reference:  # a ratio, or a time, possibly with am or pm
        return as_text(prediction) == as_text(reference)
    if a.percent != b.percent or not same_units(a, b) or r"\infty" in prediction + reference:
        return False
    if a.value is not None:
        return algebra.same_as_value(b.core, a.value)
    if b.value is not None:
        return algebra.same_as_value(a.core, b.value)
    return algebra.same_expression(a.core, b.core)


def _depth(text: str) -> int:
    """Return the maximum nesting depth of brackets of any kind; unclosed brackets count."""
    deepest = depth = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest
