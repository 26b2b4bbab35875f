"""Words, or letters of algebra? Section 9 of docs/grading.md.

no solution, west, x-axis, \text{ even }     words, compared as such
p - q, x y, ab, AB                            letters, left to algebra
"""

from __future__ import annotations

import re

from rlsys.rewards.math.spelling import key

MIN_WORD = 3  # letters; fewer are symbols, and no more than these may be a product of letters
# Short words that answers are made of; none of them is a usual product of letters.
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


def same_words(found: str, wanted: str) -> bool | None:
    """None where both may be products of letters or other expressions."""
    a, b = _phrase(found), _phrase(wanted)
    if a is not None and a == b:
        return True
    if _only_words(found, a) or _only_words(wanted, b):
        return False if not _same_letters(found, wanted) else None
    if _quoted(found) != _quoted(wanted):
        return as_text(found) == as_text(wanted)
    return None


def as_text(text: str) -> str:
    """What two equal texts have in common, in \\text or not."""
    return key(re.sub(" +", " ", _QUOTED.sub(r" \1 ", text))).casefold()


def _phrase(text: str) -> str | None:
    """Words in one form, if the text can be that. Case counts in single letters and in pairs."""
    inside = re.sub(" +", " ", _QUOTED.sub(r" \1 ", text)).strip(" ().")
    if not _WORDS.fullmatch(inside) and not (_QUOTED.fullmatch(text) and inside):
        return None
    return inside.casefold() if _is_phrase(inside) or (len(inside) >= MIN_WORD and _RUN.fullmatch(inside)) else inside


def _only_words(text: str, phrase: str | None) -> bool:
    """Whether a text that can be words can be nothing else."""
    return phrase is not None and (_QUOTED.fullmatch(text) is not None or _is_phrase(phrase) or bool(_quoted(text)))


def _is_phrase(text: str) -> bool:
    """A run of more letters than a product has, a short word, or more than one letter beside a space."""
    runs = _RUN.findall(text)
    if not _WORDS.fullmatch(text) or any(len(run) > MIN_WORD for run in runs) or not _SHORT.isdisjoint(_lower(runs)):
        return True
    if re.search(r"[A-Za-z]\.", text):  # p.m.
        return True
    return " " in text and "-" not in text and any(len(run) > 1 for run in runs)


def _lower(runs: list[str]) -> list[str]:
    return [run.casefold() for run in runs]


def _same_letters(found: str, wanted: str) -> bool:
    """Whether one is a product or sum in so many signs, and the other has no letters but those: a b c d and abcd."""
    if r"\text" in found + wanted:
        return False
    letters = [sorted("".join(_RUN.findall(_COMMAND.sub("", text)))) for text in (found, wanted)]
    return letters[0] == letters[1] and any(map(_spelled_out, (found, wanted)))


def _spelled_out(text: str) -> bool:
    """Whether no run of letters in it is long enough for a word, or signs of algebra stand round them."""
    return all(len(run) == 1 for run in _RUN.findall(_COMMAND.sub("", text))) or bool(re.search(r"^-|[+*^=(]", text))


def _quoted(text: str) -> list[str]:
    return [as_text(match[0]) for match in _QUOTED_WORDS.finditer(text)]
