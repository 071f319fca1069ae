"""Tables and figures of run folders, finished or not, with the paper's numbers beside them.
Imports neither torch nor the engine, so it starts at once and runs anywhere."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from deepvit.commands.main import parser_of
from deepvit.config.signature import check_range
from deepvit.errors import BAD_INPUT, DONE, UserError


def main(arguments: Sequence[str]) -> int:
    from deepvit.report.runs import read_run, read_runs
    from deepvit.report.write import write_report
    parser = parser_of("report")
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUNS", help="run folders, or folders above them")
    parser.add_argument("--out", type=Path, help="where to write (default: report/ in the first of RUNS)")
    parser.add_argument("--threshold", type=float, default=0.9,
                        help="mean M above which adjacent blocks count as similar (default: %(default)s)")
    parser.add_argument("--compare", nargs=2, type=Path, default=(), metavar=("RUN_A", "RUN_B"),
                        help="what differs between two runs, and both curves")
    options = parser.parse_args(arguments)
    check_range("--threshold", options.threshold, -1, 1)
    paths = options.runs or options.compare
    if not paths:
        raise UserError("Give run folders, or a folder above them, such as: deepvit report runs/")
    runs, problems = read_runs(paths)
    pair, missing = [], {}
    for folder in options.compare:
        try:
            pair.append(read_run(folder))
        except UserError as error:
            missing[folder] = error if folder.exists() else f"{folder} does not exist, give a run folder."
    out = options.out or (paths[0] if paths[0].is_dir() else paths[0].parent) / "report"
    for line in write_report(runs, problems, out, options.threshold, [] if missing else pair,
                             shlex.join(["deepvit", "report", *arguments])):
        print(line)
    for sentence in missing.values():
        print(f"--compare is left out: {sentence}", file=sys.stderr)
    return BAD_INPUT if missing else DONE
