"""Shows a replayed step on the terminal, and writes it as JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlsys.replay.replay_step import Figure, Piece, Replay
from rlsys.types import Array
from rlsys.utils.atomic_files import replace_file


def show(found: Replay, tolerance: float, console: Console) -> None:
    """Print all metrics, the notes, and whether the step is the same within `tolerance`."""
    rollouts = found.recorded.rollouts
    size = f"{len(rollouts.group)} completions of {len(rollouts.problems)} problems, {len(rollouts.tokens)} tokens"
    console.print(f"step {found.step}: {size}", highlight=False)
    table = Table()
    for name in ("metric", "recorded", "recomputed", "difference"):
        table.add_column(name, justify="left" if name == "metric" else "right", no_wrap=True)
    for figure in found.figures:
        style = "" if figure.difference <= tolerance else "red"
        values = (_number(figure.recorded), _number(figure.recomputed), _difference(figure))
        table.add_row(escape(figure.name), *values, style=style)
    console.print(table, highlight=False)
    for note in found.notes:
        console.print(f"[yellow]note[/] {escape(note)}", soft_wrap=True, highlight=False)
    differing = found.differing(tolerance)
    if differing:
        names = escape(", ".join(figure.name for figure in differing))
        console.print(f"[red]not the same[/] beyond {tolerance:g}: {names}", soft_wrap=True, highlight=False)
    else:
        exact = all(figure.difference == 0 for figure in found.figures)
        bound = "bit-identical" if exact else f"within {tolerance:g}"
        console.print(f"[green]the same[/], {bound}", highlight=False)


def write(found: Replay, path: Path) -> None:
    """Write the replay as JSON, with a row per datum: log-probabilities of the learner (p) and the sampler (q), and the
    advantage, of each token trained on."""
    body = {
        "step": found.step,
        "started": found.started,
        "notes": list(found.notes),
        "figures": [
            {
                "name": figure.name,
                "recorded": _finite(figure.recorded),
                "recomputed": _finite(figure.recomputed),
                "difference": _finite(figure.difference),
            }
            for figure in found.figures
        ],
        "datums": [row for piece in found.pieces for row in _datums(found, piece)],
    }
    replace_file(path, (json.dumps(body, allow_nan=False) + "\n").encode())


def _datums(found: Replay, piece: Piece) -> list[dict[str, object]]:
    batch, rollouts = piece.batch, found.recorded.rollouts
    counts = batch.columns["weights"] != 0
    rows = []
    for d, completion in enumerate(piece.rows):
        at = np.flatnonzero(counts[batch.offsets[d] : batch.offsets[d + 1]]) + batch.offsets[d]
        rows.append(
            {
                "completion": int(completion),
                "problem": int(rollouts.problems[rollouts.group[completion]]),
                "reward": float(found.recorded.rewards[completion]),
                "substep": piece.substep,
                "tokens": batch.targets[at].tolist(),
                "p": _values(piece.logprobs[at]),
                "q": _values(batch.columns["logprobs"][at]),
                "advantages": _values(batch.columns["advantages"][at]),
            }
        )
    return rows


def _values(column: Array) -> list[float | None]:
    return [_finite(value) for value in column.tolist()]


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.9g}"


def _difference(figure: Figure) -> str:
    if figure.recorded is None or figure.recomputed is None:
        return "missing"
    return "0" if figure.difference == 0 else f"{figure.difference:.1e}"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
