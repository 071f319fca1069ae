"""Everything we ask of a GPU, in one session: the tests marked gpu, the bench, a run killed and continued, small ones.

    python tests/gpu_session.py [FOLDER]              under 7 minutes on an H100; FOLDER: $OUT if set, else runs/gpu
    python tests/gpu_session.py --only compiled [FOLDER]      the steps with that in their names: those left out before
    python tests/gpu_session.py --miniature FOLDER    all of its code on a CPU in seconds: no typo waits for a GPU
    python tests/gpu_session.py --publish FOLDER      docs/results/gpu-<card>.json and the table in docs/performance.md

What becomes known is at once a line of FOLDER/rows.jsonl, after those of an earlier call; three logs lie beside it.
Each step is a process with a time limit, forked from one that has imported torch; what fails does not end the others,
what no longer fits into the budget is skipped. Nothing need be installed: any python with torch, timm and hydra do.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]
os.environ["PYTHONPATH"] = os.pathsep.join([*sys.path[:2], os.environ.get("PYTHONPATH", "")])

import soak  # noqa: E402
import torch  # noqa: E402

from deepvit.bench import rows  # noqa: E402
from deepvit.bench.rows import against_targets  # noqa: E402
from deepvit.config.records import read_json_lines  # noqa: E402

Results = dict[str, dict[str, Any]]  # bench -> {"provenance": where and when, "rows": [...]}
BUDGET_S = 400
BEGIN, END = "<!-- begin of what gpu_session.py --publish writes -->", "<!-- end -->"


@dataclass(frozen=True)
class Step:
    """`target(*arguments)` in a process of its own; its exit code tells how it went.

    Args:
        log: its output goes to FOLDER/`log`.log; limit: seconds.
        kill_when: it is to be killed at that moment, and then has done what it should.
    """

    name: str
    log: str
    limit: float
    target: Callable[..., int]
    arguments: tuple[Any, ...]
    kill_when: Callable[[], bool] | None = None


# What the steps do

class TestRows:
    """A pytest plugin: a row for each test as it ends."""

    def __init__(self, path: Path):
        self.path = path

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or report.outcome != "passed":
            why = {"why": report.longreprtext.strip().splitlines()[-1:]} if report.failed else {}
            rows.append(self.path, "tests", {"case": "tests", "name": report.nodeid.removeprefix("tests/"),
                                             "outcome": report.outcome, "seconds": report.duration, **why})


def run_tests(path: Path, *words: str) -> int:
    """With no plugins but pytest's own and those that `words` name."""
    import pytest
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    os.chdir(ROOT)
    return int(pytest.main(["-p", "no:cacheprovider", "--continue-on-collection-errors", "--tb=short",
                            "--durations=20", *words], plugins=[TestRows(path)]))


def deepvit(*words: str) -> int:
    from deepvit.commands.main import main
    return main(words)


def compare(path: Path, whole: Path, cut: Path, bound: float) -> int:
    """A row on the two runs; 0 if they logged the same steps, and losses no further apart than `bound` of the loss."""
    logged = [[line for line in soak.lines(folder / "metrics.jsonl") if "lr" in line] for folder in (whole, cut)]
    apart = [abs(one["loss"] - other["loss"]) / one["loss"] for one, other in zip(*logged, strict=False)]
    alike = [line["step"] for line in logged[0]] == [line["step"] for line in logged[1]] and max(apart) <= bound
    rows.append(path, "run", {
        "case": "training, killed and continued", "name": f"{len(apart)} losses, {logged[0][-1]['step']} steps",
        "continued_from": [event["step"] for event in soak.events(cut, "resume")], "largest_difference": max(apart),
        "same_checkpoint": soak.fingerprint(whole) == soak.fingerprint(cut),
        "images_per_s": logged[0][-1]["images_per_s"], "data_wait": logged[0][-1]["data_wait"]})
    return 0 if alike else 1


def side_by_side(path: Path, folder: Path, runs: int, *settings: str) -> int:
    """A row with the images a second of so many runs together, each a cell of a sweep on the one device."""
    seeds = ",".join(map(str, range(runs)))
    if code := deepvit("train", "-m", *settings, f"seed={seeds}", "hydra/launcher=parallel",
                       f"hydra.launcher.cells_per_device={runs}", f"hydra.sweep.dir={folder}",
                       "hydra.sweep.subdir=${hydra.job.num}"):
        return code
    logs = [[line for line in soak.lines(folder / str(run) / "metrics.jsonl") if "lr" in line] for run in range(runs)]
    rates = [statistics.median(line["images_per_s"] for line in log[2:]) for log in logs]  # the first ones warm up
    rows.append(path, "run", {"case": "small models side by side", "name": f"{runs} runs", "images_per_s": sum(rates),
                              "each": rates})
    return 0


# The steps

BENCHES = {  # name of the step -> limit in seconds, words of `deepvit bench`; what is dear for what it tells comes last
    "ceilings": (40, "ceilings"),
    "the op": (60, "attention --seconds 2"),
    "train step": (75, "train-step --seconds 10"),
    "small model": (75, "small"),
    "memory": (75, "memory"),
    "hours of ImageNet": (60, "imagenet --seconds 3"),
    "precision": (30, "precision"),
    "evaluation": (45, "eval --seconds 3"),
    "scaling": (60, "scaling --seconds 0.5"),
    "small model, compiled": (180, "small --compile"),
    "train step, compiled": (180, "train-step --compile --seconds 5")}
QUICK = ("ceilings", "train step", "small model", "hours of ImageNet", "precision")  # in miniature

TRAINING = {  # the small model that a study trains; steps are logged and saved often, for the comparison
    "recipe": "cifar10", "model": "deepvit32", "model.embed_dim": 192, "model.num_heads": 6, "precision": "bf16",
    "ema.decay": 0.99, "data.batch_size": 512, "data.workers": max(1, min(8, (os.cpu_count() or 1) - 2)),
    "probe.images": 16, "engine.log_every": 5, "engine.save_every": 20, "schedule.epochs": "null",
    "schedule.warmup_epochs": "null", "schedule.steps": 120, "schedule.warmup_steps": 5}
SHORT = {"data.on_device": "true", "probe.images": 0, "schedule.steps": 60}
TINY = {"model.depth": 1, "model.embed_dim": 24, "model.num_heads": 3, "data.batch_size": 32, "data.workers": 0,
        "probe.images": 2, "engine.log_every": 1, "engine.save_every": 2, "schedule.steps": 30,
        "engine.accelerator": "cpu"}


def on_a_gpu(path: Path, runs: Path, cifar10: Path | None) -> list[Step]:
    """The tests run in several processes where xdist is there: kernels compile long."""
    processes = max(1, min(8, (os.cpu_count() or 1) // 2))
    at_once = ["-p", "xdist.plugin", "-n", str(processes)] if importlib.util.find_spec("xdist") else []
    small = ["--cifar10", str(cifar10)] if cifar10 else []
    data = {"data.root": cifar10, "data.fraction": 0.2} if cifar10 else {"data": "digits"}  # all take longer to decode
    first, *rest = (bench(path, name, *(small if "small" in name else [])) for name in BENCHES)
    return [first, Step("tests", "tests", 150, run_tests, (path, *at_once, "-m", "gpu and not slow", "tests")),
            *rest[:3], *a_run_killed_and_continued(path, runs, TRAINING | data, bound=0.05),
            beside(path, runs, 4, TRAINING | data | SHORT), *rest[3:]]


def in_miniature(path: Path, runs: Path) -> list[Step]:
    least = ["--device", "cpu", "--depth", "1", "--batch", "1", "--seconds", "0"]
    return [Step("tests", "tests", 60, run_tests, (path, "-m", "not gpu", "tests/test_data_prepare.py")),
            *a_run_killed_and_continued(path, runs, TRAINING | {"data": "digits"} | TINY, bound=0),
            beside(path, runs, 2, TRAINING | {"data": "digits"} | TINY | SHORT | {"schedule.steps": 8}),
            *(bench(path, name, *least) for name in QUICK)]


def bench(path: Path, name: str, *more: str) -> Step:
    limit, words = BENCHES[name]
    return Step(name, "bench", limit, deepvit, ("bench", *words.split(), *more, "--json", str(path)))


def words_of(settings: dict[str, Any]) -> list[str]:
    return [f"{name}={value}" for name, value in settings.items()]


def beside(path: Path, runs: Path, count: int, settings: dict[str, Any]) -> Step:
    return Step("small models side by side", "run", 75, side_by_side,
                (path, runs / "beside", count, *words_of(settings)))


def a_run_killed_and_continued(path: Path, runs: Path, settings: dict[str, Any], bound: float) -> list[Step]:
    """Three processes of one training command and a comparison: never cut, killed half-way, continued."""
    whole, cut, half = runs / "whole", runs / "cut", settings["schedule.steps"] // 2
    command = "train", *words_of(settings)
    again = *command, f"hydra.run.dir={cut}"
    return [Step("training", "run", 60, deepvit, (*command, f"hydra.run.dir={whole}")),
            Step("training, killed", "run", 60, deepvit, again, lambda: soak.step_reached(cut) >= half),
            Step("training, continued", "run", 60, deepvit, again),
            Step("losses compared", "run", 20, compare, (path, whole, cut, bound))]


# Taking them

def take(steps: Sequence[Step], folder: Path, budget: float) -> list[dict[str, Any]]:
    """All steps in turn, each a row of how it went."""
    path, end, taken = folder / "rows.jsonl", time.monotonic() + budget, []
    for step in steps:
        left, known = end - time.monotonic(), len(soak.lines(path))
        if left < step.limit / 2:
            row = {"went": "skipped", "seconds": 0, "why": f"{left:.0f} s are left of {budget:.0f}"}
        else:
            begun = time.monotonic()
            went = attempt(step, folder, min(step.limit, left))
            row = {"went": went, "seconds": round(time.monotonic() - begun, 1), "why": told(soak.lines(path)[known:])}
        taken.append({"case": "steps", "name": step.name, **row})
        rows.append(path, "session", taken[-1])
        print(f"{step.name}: {row['went']}, {row['seconds']} s  {row['why']}", flush=True)
    return taken


def attempt(step: Step, folder: Path, limit: float) -> str:
    run = soak.start(step.target, *step.arguments, folder=folder, log=folder / f"{step.log}.log", own_group=True)
    end = time.monotonic() + limit
    while run.process.is_alive() and time.monotonic() < end:
        if step.kill_when and step.kill_when():
            kill(run)
            return "passed"
        run.process.join(0.005 if step.kill_when else 0.2)
    if run.process.is_alive():
        kill(run)
        return f"failed: over {limit:.0f} s"
    return "passed" if run.process.exitcode == 0 and not step.kill_when else f"failed: exit code {run.process.exitcode}"


def kill(run: soak.Run) -> None:
    """And what it has started; a moment after its birth it has no group of its own yet."""
    run.send(signal.SIGKILL, group=True)
    run.send(signal.SIGKILL)
    run.process.join()


def told(found: Sequence[dict[str, Any]]) -> str:
    """What a step's rows say, in a few words."""
    outcomes = Counter(row["outcome"] for row in found if row["bench"] == "tests")
    figures = [row for row in found if row["bench"] not in ("tests", "provenance")]
    failed = [f"{row['name']}: {row['failed']}" for row in figures if "failed" in row]
    parts = [f"{count} tests {outcome}" for outcome, count in outcomes.items()]
    parts += [f"{len(figures) - len(failed)} rows measured"] if figures else []
    return ", ".join(parts + failed)


def read(path: Path) -> Results:
    """All whole lines of the file, by bench."""
    results: Results = {}
    provenance: dict[str, Any] = {}
    for line in read_json_lines(path):
        bench = line.pop("bench")
        if bench == "provenance":
            provenance = line
        else:
            results.setdefault(bench, {"provenance": provenance, "rows": []})["rows"].append(line)
    return results


def summed_up(folder: Path, taken: list[dict[str, Any]], device: str) -> str:
    """The targets, the tests that failed, and last the steps."""
    results = {name: part["rows"] for name, part in read(folder / "rows.jsonl").items()}
    failed = [row for row in results.get("tests", []) if row["outcome"] == "failed"]
    parts = [against_targets(results, device), [{"failed": row["name"], "why": row["why"]} for row in failed], taken]
    return "\n\n".join(rows.table(part) for part in parts if part)


def publish(folder: Path, docs: Path) -> Path:
    """Writes `docs/results/gpu-<card>.json` and between the marks of docs/performance.md; run it in the checkout that
    was measured, whose revision is taken where the machine had no git."""
    from deepvit.config.provenance import git_revision
    results = read(folder / "rows.jsonl")
    results = {name: part for name, part in results.items() if name not in ("tests", "session")}
    where = {**next(part["provenance"] for part in results.values() if part["provenance"])}
    where["git"] = where["git"] or git_revision()
    results = {name: {"provenance": where, "rows": part["rows"]} for name, part in results.items()}
    card = re.sub(r"[^a-z0-9]+", "-", where["device"].lower()).strip("-")
    path = docs / "results" / f"gpu-{card}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    page = docs / "performance.md"
    before, rest = page.read_text().split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{section(results, where, path.name)}\n{END}{rest.split(END, 1)[1]}")
    return path


def section(results: Results, where: dict[str, Any], name: str) -> str:
    versions = where["versions"]
    measured = {bench: part["rows"] for bench, part in results.items()}
    judged = against_targets(measured, "cuda")
    tables = [rows.table(judged)] if judged else []
    tables += [rows.tables([{field: value for field, value in row.items() if field != "spread"} for row in part])
               for bench, part in measured.items() if bench != "scaling"]
    return (f"{where['date'][:10]}, {where['device']}, driver {where['driver']}, torch {versions['torch']}, triton "
            f"{where['triton']}, revision {where['git']}. The rows as JSON: [results/{name}](results/{name}).\n\n"
            + "\n\n".join(tables))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path(os.environ.get("OUT") or "runs/gpu"))
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds for all of it")
    parser.add_argument("--only", metavar="WORD", default="", help="the steps that have it in their names")
    parser.add_argument("--miniature", action="store_true", help="on a CPU, as small as can be")
    parser.add_argument("--publish", action="store_true", help="write the docs from FOLDER/rows.jsonl")
    given = parser.parse_args(arguments)
    if given.publish:
        print(f"{publish(given.folder, ROOT / 'docs')} and docs/performance.md are written.")
        return 0
    if not given.miniature and not torch.cuda.is_available():
        print("torch sees no CUDA device here; --miniature FOLDER runs all of it on a CPU.", file=sys.stderr)
        return 2
    folder, cifar10 = given.folder.resolve(), ROOT / ".carry" / "cifar10"
    found = cifar10 if cifar10.exists() else None
    folder.mkdir(parents=True, exist_ok=True)
    runs = Path(tempfile.mkdtemp())
    try:
        path = folder / "rows.jsonl"
        steps = in_miniature(path, runs) if given.miniature else on_a_gpu(path, runs, found)
        taken = take([step for step in steps if given.only in step.name], folder, given.budget)
    finally:
        shutil.rmtree(runs)
    print(f"\n{summed_up(folder, taken, 'cpu' if given.miniature else 'cuda')}")
    return 0 if all(row["went"] in ("passed", "skipped") for row in taken) else 1


if __name__ == "__main__":
    sys.exit(main())
