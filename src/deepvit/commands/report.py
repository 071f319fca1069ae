"""`deepvit report RUNS...`: tables and figures of run folders, finished or not, the paper's numbers beside.

Imports neither torch nor the engine, so it starts at once and runs anywhere.
"""

import argparse
import shlex
import sys
from pathlib import Path

from deepvit.errors import BAD_INPUT, DONE, UserError


def main(arguments: list[str] | None = None) -> int:
    from deepvit.report.runs import read_run, read_runs
    from deepvit.report.write import write_report
    words = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(words)
    paths = options.runs or list(options.compare or [])
    if not paths:
        raise UserError("Give run folders, or a folder above them, such as: deepvit report runs/")
    runs, problems = read_runs(paths)
    pair, missing = [], []
    for folder in options.compare or ():
        try:
            pair.append(read_run(folder))
        except UserError as error:
            missing.append(str(error) if folder.exists() else f"{folder} does not exist, give a run folder.")
    out = options.out or (paths[0] if paths[0].is_dir() else paths[0].parent) / "report"
    for line in write_report(runs, problems, out, options.threshold, [] if missing else pair,
                             shlex.join(["deepvit", "report", *words])):
        print(line)
    for sentence in dict.fromkeys(missing):
        print(f"--compare is left out: {sentence}", file=sys.stderr)
    return BAD_INPUT if missing else DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="deepvit report", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUNS", help="run folders, or folders above them")
    parser.add_argument("--out", type=Path, help="where to write (default: report/ in the first of RUNS)")
    parser.add_argument("--threshold", type=_share, default=0.9,
                        help="mean M above which adjacent blocks count as similar (default: %(default)s)")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("RUN_A", "RUN_B"),
                        help="what differs between two runs, and both curves")
    return parser


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not -1 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a cosine: give a number from -1 to 1")
    return value
