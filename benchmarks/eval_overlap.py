"""Upper bound of the time that a synchronous run would save by evaluating while the learner makes the next step.

    python -m benchmarks.eval_overlap RUN_DIR...

Read from the run's metrics.jsonl. An evaluation of step s runs beside the sampling of step s + 1. It could also run
during the update of step s + 1, but not later, when the samplers serve other weights. It is assumed to slow neither
that update nor itself.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path

from rlsys.run_state.jsonl import read_metrics


def bound(run_dir: Path) -> str:
    records = [record for record in read_metrics(run_dir) if record["stage"] == "rl"]
    steps = {record["step"]: record for record in records if "time/step_s" in record}
    # an evaluation is logged when it ends, right after the line of its step
    evals = {new["step"]: new["time"] - old["time"] for old, new in pairwise(records) if "eval/accuracy" in new}
    in_steps = sum(record["time/step_s"] for record in steps.values())
    in_evals = sum(seconds for step, seconds in evals.items() if step)
    saved = sum(
        min(seconds, steps[step + 1]["time/learn_s"]) for step, seconds in evals.items() if step and step + 1 in steps
    )
    share = saved / (in_steps + in_evals)
    return f"{run_dir}: steps {in_steps:.1f} s, evaluations {in_evals:.1f} s, at most {saved:.1f} s saved ({share:.1%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    for run in parser.parse_args().runs:
        print(bound(run))


if __name__ == "__main__":
    main()
