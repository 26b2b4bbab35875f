"""Rows of `rlsys serve`: one deployment, used through HTTP and through `rlsys.ServiceClient` in turn.

    python -m benchmarks.serve [step] [load] [token] [pass] [fairness] [eight_users]

The first four need .clients/tinker-0.38.0 (make clients).


- step: a GRPO step of the official SDK (`benchmarks/serve_step.py`).
- load: 2,000 sample requests at once (`benchmarks/serve_load.py`).
- token, pass: a sample of one token, and one forward_backward of 64 x 512 tokens (`benchmarks/serve_overhead.py`).
- fairness, eight_users: clients that share the learner (`benchmarks/serve_fairness.py`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from benchmarks.rows import Row, finish
from benchmarks.serve_fairness import eight_users, fairness
from benchmarks.serve_load import load
from benchmarks.serve_overhead import one_pass, one_token
from benchmarks.serve_setup import Served, served
from benchmarks.serve_step import step

ROWS: dict[str, Callable[[Served, int], list[Row]]] = {
    "step": lambda server, repeats: [step(server, repeats)],
    "load": load,
    "token": lambda server, repeats: [one_token(server, repeats)],
    "fairness": lambda server, repeats: [fairness(server, repeats)],
    "eight_users": lambda server, repeats: [eight_users(server, repeats)],
    "pass": lambda server, repeats: [one_pass(server, repeats)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="default: all")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    given = parser.parse_args()
    unknown = set(given.rows) - ROWS.keys()
    if unknown:
        parser.error(f"found {', '.join(sorted(unknown))}; wanted {', '.join(ROWS)}")
    with served(given.dtype) as server:
        print(f"server: process {server.pid}", file=sys.stderr)
        for name in given.rows or ROWS:
            for row in ROWS[name](server, given.repeats):
                finish(row)


if __name__ == "__main__":
    main()
