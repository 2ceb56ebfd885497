"""The command line: `python -m tests.fuzz KIND --seeds A:B`."""

from __future__ import annotations

import argparse
import sys

from tests.fuzz.harness import fuzz, serve


def main() -> None:
    """Run the seeds and report; exit code 1 if any failed."""
    parser = argparse.ArgumentParser(prog="tests.fuzz", description="Try inputs made from seeds.")
    parser.add_argument("kind", choices=("graphs", "checkpoints"))
    parser.add_argument("--seeds", default="0:100", help="first:end, as a slice")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--serve", type=int, metavar="DESCRIPTOR", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        serve(options.kind, options.serve)
        return
    first, end = map(int, options.seeds.split(":"))
    report = fuzz(options.kind, range(first, end), options.workers, say=print)
    print(report)
    sys.exit(1 if report.failures else 0)


main()
