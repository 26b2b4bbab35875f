"""Held-out problems stay held out: which problems two splits share, and which part of one set is kept apart.

Two prompts are one problem if they agree after Unicode NFKC, case folding, runs of white space as one space, and quotes
and sentence marks at the ends left out. Numbers, signs and LaTeX stay: "5!" is not "5", and "-5" is not "5".
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence

from rlsys.errors import ConfigError

_QUOTES = (
    "\"'`"
    "\N{LEFT DOUBLE QUOTATION MARK}\N{RIGHT DOUBLE QUOTATION MARK}"
    "\N{LEFT SINGLE QUOTATION MARK}\N{RIGHT SINGLE QUOTATION MARK}"
)
_SENTENCE_ENDS = ".,;:?\N{IDEOGRAPHIC FULL STOP}"
_SHOWN = 120  # characters of a prompt in a message


def normalise(prompt: str) -> str:
    """What is left of a prompt when all is gone that does not make it another problem."""
    text = " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())
    return text.lstrip(_QUOTES + " ").rstrip(_QUOTES + _SENTENCE_ENDS + " ") or text


def shared(train: Sequence[str], held_out: Sequence[str]) -> dict[int, int]:
    """Place of each training prompt that is held out too -> its first place among the held-out ones."""
    places: dict[str, int] = {}
    for place, prompt in enumerate(held_out):
        places.setdefault(normalise(prompt), place)
    keys = map(normalise, train)
    return {place: places[key] for place, key in enumerate(keys) if key in places}


def refuse_shared(train: Sequence[str], held_out: Sequence[str]) -> None:
    """Of prompts.

    Raises:
        ConfigError: a held-out problem is a training problem too.
    """
    found = shared(train, held_out)
    if found:
        raise ConfigError(
            f"task: {len(set(found.values()))} of {len(held_out)} held-out problems are training problems too, such as "
            f"{example(found, train, held_out)}; evaluate on others: set task.eval to another source"
        )


def example(found: dict[int, int], train: Sequence[str], held_out: Sequence[str]) -> str:
    """The first of `found`, in words, with both places."""
    at_train, at_held_out = next(iter(found.items()))
    return (
        f"training problem {at_train} {train[at_train][:_SHOWN]!r}, held-out problem {at_held_out} "
        f"{held_out[at_held_out][:_SHOWN]!r}"
    )


def repeated(prompts: Sequence[str]) -> int:
    """Prompts that stood there before."""
    return len(prompts) - len(set(map(normalise, prompts)))


def kept_apart(prompt: str, share: float) -> bool:
    """Whether a prompt belongs to the held-out `share` of its set: by its hash, so that repeats fall on one side."""
    digest = hashlib.blake2b(normalise(prompt).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64
