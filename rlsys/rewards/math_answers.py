"""Is this completion's final answer the right one?

Both answers are extracted by the rules of rlsys.rewards.extraction; a reference without box or mark is the answer as a
whole. Two answers are equal when, without outer whitespace, `$` and a final full stop,
1. they are the same text; or
2. both are plain numbers (sign, digits, thousands separators, decimals) of the same exact value; or
3. math-verify parses both as LaTeX and finds them equal. It is not asked about two plain numbers of at most 6 decimals:
   it rounds to 6, so that it would say what 2 says, at a hundredth of the speed.

Model output is never executed: math-verify's plain-expression parser, which ends in `eval`, is not used, only its LaTeX
grammar. Its own timeouts are off, because they need SIGALRM and so the main thread; work that does not end is killed by
rlsys.rewards.pool.
"""

from __future__ import annotations

import logging
from decimal import Decimal

from math_verify import LatexExtractionConfig, parse, verify

from rlsys.rewards.extraction import extract, plain_number, tidy

# Longer answers are wrong unread. GSM8K's longest is 11 characters; parsing what fits takes under a second.
MAX_ANSWER_CHARS = 256
# The same for brackets: the LaTeX grammar backtracks, 12 nested squares take half a minute, 8 a third of a second.
MAX_ANSWER_DEPTH = 8
MAX_DECIMALS = 6  # what math-verify rounds to

_LATEX = [LatexExtractionConfig(boxed_match_priority=0)]

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its timeouts are off: they are, on purpose


def grade(completion: str, answer: str) -> float:
    """1 if the completion's final answer equals `answer`, else 0.

    Raises:
        ValueError: the reference answer is empty, so no completion could be right.
    """
    in_reference = extract(answer)
    wanted = tidy(answer if in_reference is None else in_reference)
    if not wanted:
        raise ValueError(f"the reference answer {answer[:80]!r} is empty")
    found = extract(completion)
    return 0.0 if found is None else float(equal(found, wanted))


def equal(found: str, wanted: str) -> bool:
    """Whether two extracted answers are equal; not symmetric for equations, as math-verify is not."""
    found, wanted = tidy(found), tidy(wanted)
    if found == wanted:
        return found != ""
    a, b = plain_number(found), plain_number(wanted)
    if a is not None and b is not None and (a == b or max(_decimals(a), _decimals(b)) <= MAX_DECIMALS):
        return a == b
    if len(found) > MAX_ANSWER_CHARS or _depth(found) > MAX_ANSWER_DEPTH:
        return False
    target, gold = (parse(rf"\boxed{{{text}}}", _LATEX, parsing_timeout=None) for text in (found, wanted))
    return bool(verify(gold, target, timeout_seconds=None))


def _decimals(number: Decimal) -> int:
    exponent = number.as_tuple().exponent
    assert isinstance(exponent, int)  # only NaN and infinity have another, and no digits spell them
    return -exponent


def _depth(text: str) -> int:
    """How deep brackets of any kind nest, or how many stay open."""
    deepest = depth = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest
