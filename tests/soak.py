"""Kills training runs and continues them until they are done, then compares them with a run that was never cut.

    python tests/soak.py                    200 kills; prints the count of differences, draws docs/img/soak.png
    python tests/soak.py --kills 20

The runs are real processes, forked from one that has imported torch (so a kill costs milliseconds, not seconds), and
end by SIGKILL at a random moment: while starting, training, saving or evaluating. The tests use the same functions.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PRELOADED = ["deepvit.run.train", "deepvit.run.launch", "torch._dynamo", "torch.utils.tensorboard", "sklearn.datasets",
             "timm.optim", "timm.data"]

# Everything that has randomness or state of its own: augmentation, mixing, drop path, dropout, head BatchNorm, EMA,
# accumulation, gradient clipping; a step is logged, and a checkpoint or an evaluation is never far. On a CPU, where
# equal means equal to the bit.
EVERYTHING = [
    "engine.accelerator=cpu", "model=vit", "model/attention=reattention", "model.attention.norm_batch=8",
    "model.depth=2", "model.embed_dim=24", "model.num_heads=3",
    "model.drop_path_rate=0.2", "model.drop_rate=0.1", "augment.mixup=0.8", "augment.cutmix=1.0", "augment.hflip=0.5",
    "augment.mix_prob=1.0", "augment.auto_augment=rand-m9-mstd0.5-inc1", "augment.random_erasing=0.25",
    "augment.crop_scale=[0.5,1.0]", "augment.label_smoothing=0.1", "ema.decay=0.9", "optimizer.clip_grad=1.0",
    "optimizer.lr=0.003", "data.batch_size=32", "data.eval_batch_size=60", "data.workers=0", "engine.device_batch=16",
    "engine.log_every=1", "engine.save_every=3",
    "schedule.epochs=null", "schedule.warmup_epochs=null", "schedule.eval_epochs=null",
    "schedule.steps=60", "schedule.warmup_steps=10", "schedule.eval_steps=10", "probe.images=4"]


@dataclass
class Run:
    """A training process and where its words go."""

    process: multiprocessing.Process
    folder: Path
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def words(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def send(self, number: int = signal.SIGKILL, group: bool = False) -> None:
        """A signal, to its process group if `group`; nothing happens if it has ended."""
        with suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.pid, number)

    def wait(self, seconds: float = 60) -> int:
        """The exit code; a run that does not end in time is killed and its words are shown."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.send()
            raise AssertionError(f"still running after {seconds} s: {self.words()}")
        return self.process.exitcode

    def wait_until(self, reached: Callable[[], bool], seconds: float = 60) -> None:
        """Returns when `reached()` or when the process has ended."""
        end = time.monotonic() + seconds
        while not reached() and self.process.is_alive():
            assert time.monotonic() < end, f"not reached in {seconds} s: {self.words()}"
            time.sleep(0.002)


def compose(*overrides: str) -> dict[str, Any]:
    from deepvit.config.compose import compose as composed
    return composed([*EVERYTHING, *overrides])


def changed(config: dict[str, Any], **values: Any) -> dict[str, Any]:
    """A copy with e.g. `data_workers=2`, `engine_save_every=5`: the group and the key."""
    copy = {name: dict(value) if isinstance(value, dict) else value for name, value in config.items()}
    for name, value in values.items():
        group, key = name.split("_", 1)
        copy[group][key] = value
    return copy


_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(PRELOADED)


def start(target: Callable[..., Any], *arguments: Any, folder: Path, log: Path | None = None, **options: Any) -> Run:
    """`target(*arguments)` in a process of its own; `options` as of `_begin`."""
    log = log or folder.with_name(folder.name + ".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    process = _server.Process(target=_begin, args=(target, arguments, str(log)), kwargs=options, daemon=False)
    process.start()
    return Run(process, folder, log)


def train(config: dict[str, Any], folder: Path, **options: Any) -> Run:
    """One training process on `folder`."""
    return start(_train, config, str(folder), folder=folder, **options)


def _begin(target: Callable[..., Any], arguments: tuple[Any, ...], log: str, environment: dict[str, str] | None = None,
           largest_file: int | None = None, own_group: bool = False) -> None:
    """`largest_file`: bytes, the kernel's limit; `own_group`: so that a signal can be sent to it and its children."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    if own_group:
        os.setpgid(0, 0)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    os.environ.update(environment or {})
    multiprocessing.set_start_method("fork", force=True)  # of its loading processes, as everywhere else
    import torch
    torch.set_num_threads(1)
    sys.exit(target(*arguments))


def _train(config: dict[str, Any], folder: str) -> int:
    from deepvit.run.launch import run_rank
    outcome = run_rank("train", config, Path(folder))
    if outcome.message:
        print(outcome.message, flush=True)
    return outcome.code


# What a run leaves

def lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a .jsonl file."""
    if not path.exists():
        return []
    whole = path.read_text().split("\n")[:-1]
    return [json.loads(line) for line in whole if line]


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in lines(folder / "events.jsonl") if event["event"] == kind]


def step_reached(folder: Path) -> int:
    try:
        return max([line["step"] for line in lines(folder / "metrics.jsonl")], default=-1)
    except json.JSONDecodeError:  # half a line is being written
        return -1


CLOCKED = ("images_per_s", "data_wait", "eval_images_per_s", "lr_time")


def record(folder: Path) -> list[str]:
    """All logged numbers but those of the clock, exact to the bit, in the order in which they were logged."""
    def exact(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: exact(one) for name, one in value.items() if name not in CLOCKED}
        if isinstance(value, list):
            return [exact(one) for one in value]
        return value.hex() if isinstance(value, float) else value

    return [json.dumps(exact(line)) for line in lines(folder / "metrics.jsonl")]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in lines(folder / "metrics.jsonl") if "lr" in line]


def fingerprint(folder: Path) -> str:
    """sha256 over every tensor and counter of the last checkpoint: weights, EMA, moments, running statistics."""
    import torch
    digest = hashlib.sha256()

    def add(name: str, value: Any) -> None:
        digest.update(name.encode())
        if isinstance(value, torch.Tensor):
            digest.update(value.contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                add(f"{name}.{key}", value[key])
        elif isinstance(value, (list, tuple)):
            for key, one in enumerate(value):
                add(f"{name}.{key}", one)
        else:
            digest.update(repr(value).encode())

    content = torch.load(folder / "checkpoints" / "last.pt", map_location="cpu", weights_only=True)
    for part in ("model", "ema", "optimizer", "scaler", "step", "evaluated", "best"):
        add(part, content.get(part))
    return digest.hexdigest()


# Killing

@dataclass
class Kills:
    """How often and when a run was killed; `where` counts what it was doing."""

    count: int = 0
    starts: int = 0
    where: dict[str, int] = field(default_factory=dict)


def run_cut(config: dict[str, Any], folder: Path, moments: random.Random, kills: int, tally: Kills,
            longest: float = 1.5, workers: tuple[int, ...] = (0,)) -> None:
    """A run to its end through `kills` SIGKILLs at random moments; `data.workers` changes with every start.

    A third of the kills waits for a checkpoint to be half written, a third for an evaluation; the rest is blind. A
    moment comes `longest` seconds after the start at the latest, and before a share of the steps is done that leaves
    some for the kills to come, however fast the machine is.
    """
    aims = [None, _is_saving, _is_evaluating]
    shares = [config["schedule"]["steps"] * (number + 1) / (kills + 1) for number in range(kills)]
    for number in range(kills):
        run = train(changed(config, data_workers=workers[number % len(workers)]), folder)
        tally.starts += 1
        aim = aims[number % 3]
        moment = time.monotonic() + moments.uniform(0, longest)
        run.wait_until(lambda end=moment, share=shares[number]:
                       time.monotonic() > end or step_reached(folder) >= share)
        if aim is not None:
            run.wait_until(partial(_is_at, run, aim), 30)
        run.send()
        if run.wait() == -signal.SIGKILL:
            tally.count += 1
            doing = _doing(run)
            tally.where[doing] = tally.where.get(doing, 0) + 1
        else:
            break
    last = train(config, folder)
    tally.starts += 1
    assert last.wait(120) == 0, last.words()


def _is_at(run: Run, aim: Callable[[Path], bool]) -> bool:
    return _has_begun(run) and aim(run.folder)


def _has_begun(run: Run) -> bool:
    """It has swept and trimmed what the one before left, so that what lies there now is its own."""
    begun = [event for event in lines(run.folder / "events.jsonl") if event["event"] in ("start", "resume")]
    return bool(begun) and begun[-1]["processes"] == [run.pid]


def _is_saving(folder: Path) -> bool:
    return (folder / "checkpoints" / "last.pt.tmp").exists()


def _is_evaluating(folder: Path) -> bool:
    """Just after a step at which an evaluation is due."""
    step = step_reached(folder)
    return step > 0 and step % 10 == 0 and "top1" not in lines(folder / "metrics.jsonl")[-1]


def _doing(run: Run) -> str:
    if not _has_begun(run):
        return "starting"
    if _is_saving(run.folder):
        return "saving"
    return "evaluating" if _is_evaluating(run.folder) else "training"


def draw(uncut: list[float], cut: list[float], kills: int, path: Path) -> None:
    """The two loss curves over each other, and their difference."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 4.2), sharex=True, height_ratios=[3, 1],
                                         layout="constrained")
    steps = range(1, len(uncut) + 1)
    top.plot(steps, uncut, linewidth=5, color="#9ecae1", label="never cut")
    top.plot(steps, cut, linewidth=1.2, color="#08306b", label=f"killed {kills} times")
    top.set_ylabel("training loss")
    top.legend(frameon=False)
    bottom.plot(steps, [one - other for one, other in zip(uncut, cut, strict=True)], color="#08306b", linewidth=1.2)
    bottom.set_ylabel("difference")
    bottom.set_ylim(-1e-3, 1e-3)
    bottom.set_xlabel("step")
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def differences(first: Path, second: Path) -> int:
    """Logged lines that are not the same, plus one if the last checkpoints differ in any bit."""
    one, other = record(first), record(second)
    unequal = sum(left != right for left, right in zip(one, other, strict=False)) + abs(len(one) - len(other))
    return unequal + (fingerprint(first) != fingerprint(second))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--steps", type=int, default=200, help="of each run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--folder", type=Path, default=Path("runs/soak"))
    parser.add_argument("--image", type=Path, default=ROOT / "docs" / "img" / "soak.png")
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    # Every second run has steps with nothing due after them.
    configs = [compose(f"schedule.steps={options.steps}", *words) for words in (
        [], ["engine.log_every=4", "engine.save_every=7"])]
    begun = time.monotonic()
    uncuts = [options.folder / f"uncut{kind}" for kind in range(len(configs))]
    for config, uncut in zip(configs, uncuts, strict=True):
        assert train(config, uncut).wait(600) == 0
    print(f"never cut: {options.steps} steps, twice, in {time.monotonic() - begun:.1f} s", flush=True)
    tally, compared, moments, most = Kills(), 0, random.Random(options.seed), 0
    found = int(fingerprint(uncuts[0]) != fingerprint(uncuts[1]))  # how often a run writes must not matter
    number = 0
    while tally.count < options.kills:
        before, folder, kind = tally.count, options.folder / f"cut{number}", number % len(configs)
        run_cut(configs[kind], folder, moments, min(40, options.kills - tally.count), tally, workers=(0, 1, 2))
        unequal = differences(uncuts[kind], folder)
        found += unequal
        compared += len(record(uncuts[kind]))
        if kind == 0 and tally.count - before > most:
            most, best = tally.count - before, folder
        print(f"run {number}: {tally.count - before} kills, {unequal} differences", flush=True)
        number += 1
    draw(losses(uncuts[0]), losses(best), most, options.image)
    print(f"\n{tally.count} kills of {number} runs ({tally.starts} starts) in {time.monotonic() - begun:.0f} s: "
          f"{', '.join(f'{count} while {doing}' for doing, count in sorted(tally.where.items()))}.\n"
          f"{compared} logged lines and {number} final checkpoints compared with runs that were never cut: "
          f"{found} differences.\nThe loss curves: {options.image}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
