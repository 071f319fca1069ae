"""What becomes of a config, as `test_settings_arrive` sees it: built objects, batches, losses, whole runs."""

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml

from deepvit.config.records import read_json_lines
from deepvit.data import source_of
from deepvit.engine.progress import Display
from deepvit.engine.ranks import Ranks
from deepvit.engine.signals import StopRequest
from deepvit.run import build, launch, measures
from deepvit.run.launch import train_job

ALONE = Ranks(0, 1, torch.device("cpu"))
DATA: dict[str, Path] = {}  # what stands for a path in an override -> the path; TMP: where runs may go


class Run:
    """A composed config, and what the functions that a run is built by make of it."""

    def __init__(self, config: dict[str, Any]):
        self.config = config
        self.settings = build.read_settings(config)
        build.check(self.settings, ALONE)

    @cached_property
    def splits(self):
        return source_of(self.settings.data).splits()

    @cached_property
    def built(self):
        return build.build(self.settings, ALONE)

    def batches(self, steps: int = 2):
        return self.built.make_batches(0, steps)


# What is to change with a setting.

def initial(run):
    return torch.cat([parameter.detach().flatten() for parameter in run.built.model.parameters()]).tolist()


def classes(run):
    return run.splits.class_ids


def sizes(run):
    return len(run.splits.train), len(run.splits.val)


def decoders(run):
    return run.splits.train.decoder, run.splits.val.decoder


def rates(run):
    schedule = run.built.stepper.schedule
    return [schedule(step) for step in range(1, schedule.total + 1)]


def plan(name: str) -> Callable:
    return lambda run: getattr(run.built.plan, name)


def images(run):
    """Training images as the workers make them."""
    return [micro.images.tolist() for step in run.batches() for micro in step]


def indices(run):
    return [micro.indices.tolist() for step in run.batches() for micro in step]


def shapes(run):
    evaluated = build.eval_batches(run.settings.data, run.splits.val, ALONE)()
    return [tuple(batch.images.shape) for batch in [*next(run.batches()), *evaluated]]


def inputs(run):
    """Training images and targets as the model and the loss get them."""
    return [[value.tolist() for value in run.built.stepper.prepare(micro, step, "cpu", training=True)]
            for step, batch in enumerate(run.batches(4)) for micro in batch]


def mixing(run):
    return run.built.stepper.prepare.mixing(0, (16, 16))


def branch_masks(run):
    """Which branches stochastic depth leaves out for which images."""
    masks = run.built.stepper.masks
    masks.draw(0, 6)
    masks.place(0, 6)
    return [block.drop_path1.keep.tolist() for block in run.built.model.blocks[1:]]


def trained(run):
    """Losses of three updates, and the weights after them that count."""
    state, stepper = run.built.state, run.built.stepper
    losses = [stepper.update(state, batch)[1].loss.item() for batch in run.batches(3)]
    return losses, [parameter.tolist() for parameter in state.evaluated_model.parameters()]


def evaluated(run):
    evaluate = measures.evaluator(run.built, StopRequest())
    return evaluate(run.built.model, Display(False)).confidences.tolist()


def kept_batches(run):
    """Whether evaluation makes its batches once."""
    batches = build.eval_batches(run.settings.data, run.splits.val, ALONE)
    return next(batches()) is next(batches())


def in_memory(run):
    return run.splits.train.cache_decoded()


def workers(run):
    steps = run.batches(8)
    next(steps)
    count = len(multiprocessing.active_children())
    steps.close()
    return count


def tf32(run):
    finished(run)
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def threads(run):
    before = torch.get_num_threads()
    try:
        finished(run)
        return torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def deterministic(run):
    with mock.patch.dict(os.environ):
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
        finished(run)
        return torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")


def blocks_passed(run):
    """Forward passes of a block in one update: checkpointing repeats them."""
    calls = []
    run.built.model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    run.built.stepper.update(run.built.state, next(run.batches()))
    return len(calls)


def joined(run):
    """What a rank is joined with."""
    with mock.patch("deepvit.engine.ranks.join") as join:
        launch.run_rank(lambda *_: None, run.config, tempfile.mkdtemp(dir=DATA["TMP"]))
    return join.call_args.args


def launched(run):
    """(processes, restarts) that torch's launcher is asked for."""
    with mock.patch("torch.distributed.launcher.api.elastic_launch") as elastic:
        launch.launch(train_job, run.config, Path(tempfile.mkdtemp(dir=DATA["TMP"])))
    return elastic.call_args and (elastic.call_args.args[0].nproc_per_node, elastic.call_args.args[0].max_restarts)


def finished(run) -> Path:
    """The folder of the whole run."""
    folder = Path(tempfile.mkdtemp(dir=DATA["TMP"])) / "run"
    train_job(run.config, folder, ALONE, StopRequest())
    return folder


def made_again(run):
    """Whether the same command makes another run of a finished one."""
    result = finished(run) / "metrics.json"
    before = result.stat().st_mtime_ns
    train_job(run.config, result.parent, ALONE, StopRequest())
    return result.stat().st_mtime_ns != before


def recorded_origin(run):
    return yaml.safe_load((finished(run) / "config.yaml").read_text()).get("origin")


def whole(run):
    """The files of a run's folder and the steps of its metrics."""
    folder = finished(run)
    lines = read_json_lines(folder / "metrics.jsonl")
    return {"files": sorted(path.name.partition(".out.")[0] for path in folder.glob("*")),  # without the clock
            "kept": sorted(path.name for path in folder.glob("checkpoints/step-*.pt")),
            "checkpoints": sorted(path.name for path in folder.glob("checkpoints/*.pt")),
            "logged": [line["step"] for line in lines if "lr" in line],
            "probed": [line["step"] for line in lines if "probe" in line],
            "probe": [line["probe"] for line in lines if "probe" in line],
            "evaluated": [line["step"] for line in lines if "top1" in line]}
