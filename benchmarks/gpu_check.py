"""Everything that needs CUDA, with nothing but torch, transformers and peft: ``make gpu-check``.

    python -m benchmarks.gpu_check                         all of it: numerics, then the row of each shape
    python -m benchmarks.gpu_check --skip-rows             numerics alone
    python -m benchmarks.gpu_check --only-rows --row 8b    the row of one shape, "1.7b" or "8b"
    python -m benchmarks.gpu_check --device cpu --quick    what of it a CPU can do, with tiny shapes

The row of the large shape takes minutes: where a command may not run for long, one command each for the numerics and
for every shape.

Prints PASS or FAIL with the figure and its bound for each check, then one JSON object; the exit code is 1 where a check
failed. A row that misses its target is reported and fails nothing: speed is a target, numbers are a promise.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from benchmarks import gpu_numerics, gpu_row
from benchmarks.gpu_parts import Report
from benchmarks.rows import machine

SIZES = (4096, 16_384)


def main() -> int:
    options = _options()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu-check: found no CUDA device; wanted one, or --device cpu", file=sys.stderr)
        return 2
    _settings()
    began = time.perf_counter()
    report = Report()
    if not options.only_rows:
        with tempfile.TemporaryDirectory() as folder:
            bench = gpu_numerics.Bench(Path(folder), options.device, options.quick)
            for name, work in gpu_numerics.checks(bench).items():
                if options.check is None or name in options.check:
                    report.run(name, work)
    met = {}
    for kind in [] if options.skip_rows else options.row:
        sizes = (512,) if kind == "quick" else SIZES
        report.run(f"row {kind}", lambda kind=kind, sizes=sizes: met.update({kind: _row(kind, sizes, options)}) or ())
    failed = [check.name for check in report.checks if not check.passed]
    found = {
        "checks": [asdict(check) | {"passed": check.passed} for check in report.checks],
        "failed": failed,
        "targets of rows met": met,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "cuda": torch.version.cuda,
        "machine": machine(),
        "seconds": round(time.perf_counter() - began, 1),
    }
    print(json.dumps(found))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "gpu_check.json").write_text(json.dumps(found, indent=1) + "\n")
    print(
        f"{len(report.checks) - len(failed)} of {len(report.checks)} checks passed"
        + "".join(f"\nFAIL  {n}" for n in failed)
    )
    return 1 if failed else 0


def _row(kind: str, sizes: tuple[int, ...], options: argparse.Namespace) -> list[bool]:
    out = options.out or (Path(tempfile.gettempdir()) if options.device == "cpu" else None)
    return gpu_row.rows(kind, options.device, options.repeats, sizes, out)


def _settings() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_float32_matmul_precision("highest")  # no TF32: fp32 is what results are held to
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, and of the rows a tiny one")
    parser.add_argument(
        "--row", action="append", choices=sorted(gpu_row.SHAPES), help="again for several; default: all"
    )
    parser.add_argument("--skip-rows", action="store_true")
    parser.add_argument("--only-rows", action="store_true")
    parser.add_argument("--check", action="append", help="only this group of numerics; again for several")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="folder for gpu_check.json and the rows; default of rows: results/")
    options = parser.parse_args()
    if options.row is None:
        options.row = ["quick"] if options.quick or options.device == "cpu" else ["1.7b", "8b"]
    return options


if __name__ == "__main__":
    sys.exit(main())
