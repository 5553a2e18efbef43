"""
Trains and measures in the identity world, and writes what was found to `docs/mechanism.md`.

    python -m benchmarks.identity_world [--seeds 0 1 2] [--workers 2] [--quick] [--no-report]

It took 46 core-minutes on a CPU. What is finished is kept in `outputs/identity_world`, and a run that broke off
goes on from there. `--quick` trains next to nothing, to see that everything runs, and reports nothing.
"""

import argparse
import os
import sys
import time
from pathlib import Path

from rich.console import Console

from .parts import FULL_PLAN, QUICK_PLAN
from .report import collect, ship_checkpoint, write_report
from .running import run_all


ROOT = Path(__file__).parents[2]


def main() -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "identity_world")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--no-report", action="store_true")
    options = parser.parse_args()
    plan = QUICK_PLAN if options.quick else FULL_PLAN
    folder = options.output / plan.fingerprint
    started = time.time()
    console = Console(stderr=True)
    try:
        run_all(folder, plan, options.seeds, options.workers, console)
    except KeyboardInterrupt:
        console.print("Stopped. What is finished is kept; the same command goes on from there.")
        return 130
    console.print(f"Trained and measured in {(time.time() - started) / 60:.0f} minutes: {folder}")
    if not (options.quick or options.no_report):
        ship_checkpoint(folder, options.seeds)
        for path in write_report(collect(folder, plan, options.seeds), ROOT):
            console.print(f"Wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
