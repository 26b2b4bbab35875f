"""Deduplication of problems: finds problems that two splits share, and assigns problems to a held-out split by hash.

Two prompts are the same problem if they are equal after normalization: Unicode NFKC, case folding, each run of white
space as one space, quotes removed at both ends, sentence marks at the end only. Numbers, signs and LaTeX are kept:
"5!" and "-5" are not "5".
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
_MESSAGE_CHARS = 120  # characters of a prompt in an error message


def normalise(prompt: str) -> str:
    """Return the normalized prompt: equal for two prompts that state the same problem."""
    text = " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())
    return text.lstrip(_QUOTES + " ").rstrip(_QUOTES + _SENTENCE_ENDS + " ") or text


def find_shared(train: Sequence[str], held_out: Sequence[str]) -> dict[int, int]:
    """Return {index of a training prompt: first index of the same problem in `held_out`} for all shared problems."""
    held_out_index: dict[str, int] = {}
    for i, prompt in enumerate(held_out):
        held_out_index.setdefault(normalise(prompt), i)
    keys = map(normalise, train)
    return {i: held_out_index[key] for i, key in enumerate(keys) if key in held_out_index}


def refuse_shared(train: Sequence[str], held_out: Sequence[str]) -> None:
    """Check that the training prompts contain no held-out prompt.

    Raises:
        ConfigError: a held-out problem is also a training problem.
    """
    shared = find_shared(train, held_out)
    if shared:
        raise ConfigError(
            f"task: {len(set(shared.values()))} of {len(held_out)} held-out problems are also training problems, such "
            f"as {format_shared(shared, train, held_out)}; set task.eval to a source without training problems"
        )


def format_shared(shared: dict[int, int], train: Sequence[str], held_out: Sequence[str]) -> str:
    """Describe the first shared problem for an error message; `shared` is the result of ``find_shared``."""
    i_train, i_held_out = next(iter(shared.items()))
    return (
        f"training problem {i_train} {train[i_train][:_MESSAGE_CHARS]!r}, held-out problem {i_held_out} "
        f"{held_out[i_held_out][:_MESSAGE_CHARS]!r}"
    )


def count_repeated(prompts: Sequence[str]) -> int:
    """Count the prompts that repeat an earlier problem."""
    return len(prompts) - len(set(map(normalise, prompts)))


def is_held_out(prompt: str, share: float) -> bool:
    """Return whether a prompt belongs to the held-out `share` (0..1) of its data set.

    The prompt's hash decides, so that repeats of a problem are in the same split.
    """
    digest = hashlib.blake2b(normalise(prompt).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64
