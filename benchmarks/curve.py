"""Draw the held-out accuracy of several runs as one SVG picture, for the README and docs/.

python benchmarks/curve.py runs/quickstart-21 runs/quickstart-22 runs/quickstart-23 > docs/quickstart.svg
"""

from __future__ import annotations

import sys
from pathlib import Path

from rlsys.run_state.jsonl import read_metrics

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 640, 260, 48, 36, 16
COLOURS = ("#2457c5", "#d9730d", "#2e8b57", "#8e44ad")  # each readable on white and on black


def main(runs: list[str]) -> None:
    curves = {Path(run).name: accuracies(Path(run)) for run in runs}
    last = max(step for points in curves.values() for step, _ in points)
    box = f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12"'
    print(f'<svg xmlns="http://www.w3.org/2000/svg" {box}>')
    print("<title>Greedy accuracy on held-out problems by RL step</title>")
    for level in (0.0, 0.25, 0.5, 0.75, 1.0):
        print(f'<line x1="{LEFT}" x2="{WIDTH - 8}" y1="{y(level):.1f}" y2="{y(level):.1f}" stroke="#8884"/>')
        print(f'<text x="{LEFT - 8}" y="{y(level) + 4:.1f}" text-anchor="end" fill="#888">{level:.2f}</text>')
    for step in range(0, last + 1, 5):
        print(f'<text x="{x(step, last):.1f}" y="{HEIGHT - 14}" text-anchor="middle" fill="#888">{step}</text>')
    for i, (name, points) in enumerate(curves.items()):
        path = " ".join(f"{x(step, last):.1f},{y(value):.1f}" for step, value in points)
        print(f'<polyline points="{path}" fill="none" stroke="{COLOURS[i % 4]}" stroke-width="2"/>')
        label = f"{name}: {points[0][1]:.3f} to {points[-1][1]:.3f}"
        at = f'x="{WIDTH - 16}" y="{y(0.42) + 18 * i:.1f}" text-anchor="end" fill="{COLOURS[i % 4]}"'
        print(f"<text {at}>{label}</text>")
    print("</svg>")


def accuracies(run: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["eval/accuracy"]) for line in read_metrics(run) if "eval/accuracy" in line]


def x(step: int, last: int) -> float:
    return LEFT + 12 + step / last * (WIDTH - LEFT - 32)


def y(value: float) -> float:
    return TOP + (1.0 - value) * (HEIGHT - TOP - BOTTOM)


if __name__ == "__main__":
    main(sys.argv[1:])
