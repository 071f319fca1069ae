"""`python -m deepvit.report RUNS...`: tables and figures of run folders, finished or not, the paper's numbers beside.

Imports neither torch nor the engine, so it starts at once and runs anywhere.
"""

import argparse
import sys
from pathlib import Path

from deepvit.errors import Failure, UserError


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 failed, 2 bad input."""
    options = _parser().parse_args(arguments)
    try:
        return _report(options)
    except (UserError, Failure) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m deepvit.report", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUNS", help="run folders, or folders above them")
    parser.add_argument("--out", type=Path, help="where to write (default: report/ in the first of RUNS)")
    parser.add_argument("--threshold", type=_share, default=0.9,
                        help="mean M above which adjacent blocks count as similar (default: %(default)s)")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("RUN_A", "RUN_B"),
                        help="what differs between two runs, and both curves")
    return parser


def _share(text: str) -> float:
    value = float(text)
    if not -1 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a cosine: give a number from -1 to 1")
    return value


def _report(options: argparse.Namespace) -> int:
    from deepvit.report.runs import read_run, read_runs
    from deepvit.report.write import write_report
    paths = options.runs or list(options.compare or [])
    if not paths:
        raise UserError("Give run folders, or a folder above them, such as: python -m deepvit.report runs/")
    pair = [read_run(folder) for folder in options.compare or ()]
    runs, problems = read_runs(paths)
    out = options.out or (paths[0] if paths[0].is_dir() else paths[0].parent) / "report"
    for line in write_report(runs, problems, out, options.threshold, pair):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
