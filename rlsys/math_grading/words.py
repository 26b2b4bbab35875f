"""Distinguishes words from algebraic letters, and compares words. Section 9 of docs/grading.md.

no solution, west, x-axis, \text{ even }     words, compared as text
p - q, x y, ab, AB                            letters, compared by algebra
"""

from __future__ import annotations

import re

from rlsys.math_grading.spelling import key

MIN_WORD = 3  # letters; a shorter run is a symbol, and a run of up to this length may be a product of letters
# Short words that are common in answers and unlikely as a product of letters.
_SHORT = frozenset(
    (
        *("yes", "no", "not", "one", "two", "six", "ten", "odd", "all", "any", "off", "out", "red", "man", "men"),
        *("boy", "her", "his", "him", "she", "who", "you", "new", "old", "low", "big", "hot", "top", "win", "won"),
        *("few", "day", "mon", "tue", "wed", "thu", "fri", "sat", "sun", "jan", "feb", "mar", "apr", "jun", "jul"),
        *("aug", "sep", "oct", "nov", "dec"),
    )
)
_WORDS = re.compile(r"[A-Za-z][A-Za-z .'-]*")
_QUOTED = re.compile(r"\\text\{([^{}]*)\}")
_QUOTED_WORDS = re.compile(r"\\text\{[^{}]*[A-Za-z]{2}[^{}]*\}")
_RUN = re.compile(r"[A-Za-z]+")
_COMMAND = re.compile(r"\\[A-Za-z]+")


def same_words(prediction: str, reference: str) -> bool | None:
    """Compare two answers as words; None if both may be products of letters or other expressions."""
    a, b = _phrase(prediction), _phrase(reference)
    if a is not None and a == b:
        return True
    if _only_words(prediction, a) or _only_words(reference, b):
        return False if not _same_letters(prediction, reference) else None
    if _quoted(prediction) != _quoted(reference):
        return as_text(prediction) == as_text(reference)
    return None


def as_text(text: str) -> str:
    """Return a comparison key of a text, with or without \\text."""
    return key(re.sub(" +", " ", _QUOTED.sub(r" \1 ", text))).casefold()


def _phrase(text: str) -> str | None:
    """Return the text as normalized words; None if it cannot be words. One or two letters keep their case."""
    inside = re.sub(" +", " ", _QUOTED.sub(r" \1 ", text)).strip(" ().")
    if not _WORDS.fullmatch(inside) and not (_QUOTED.fullmatch(text) and inside):
        return None
    return inside.casefold() if _is_phrase(inside) or (len(inside) >= MIN_WORD and _RUN.fullmatch(inside)) else inside


def _only_words(text: str, phrase: str | None) -> bool:
    """Return whether a text that can be words cannot be anything else."""
    return phrase is not None and (_QUOTED.fullmatch(text) is not None or _is_phrase(phrase) or bool(_quoted(text)))


def _is_phrase(text: str) -> bool:
    """Return whether a text has a run of more than MIN_WORD letters, a common short word, or a space and a run of 2."""
    runs = _RUN.findall(text)
    if not _WORDS.fullmatch(text) or any(len(run) > MIN_WORD for run in runs) or not _SHORT.isdisjoint(_lower(runs)):
        return True
    if re.search(r"[A-Za-z]\.", text):  # p.m.
        return True
    return " " in text and "-" not in text and any(len(run) > 1 for run in runs)


def _lower(runs: list[str]) -> list[str]:
    return [run.casefold() for run in runs]


def _same_letters(prediction: str, reference: str) -> bool:
    """Return whether both have the same letters and one is clearly algebraic: a b c d and abcd."""
    if r"\text" in prediction + reference:
        return False
    letters = [sorted("".join(_RUN.findall(_COMMAND.sub("", text)))) for text in (prediction, reference)]
    return letters[0] == letters[1] and any(map(_spelled_out, (prediction, reference)))


def _spelled_out(text: str) -> bool:
    """Return whether a text is clearly algebraic: only single letters, or operators of algebra."""
    return all(len(run) == 1 for run in _RUN.findall(_COMMAND.sub("", text))) or bool(re.search(r"^-|[+*^=(]", text))


def _quoted(text: str) -> list[str]:
    return [as_text(match[0]) for match in _QUOTED_WORDS.finditer(text)]
