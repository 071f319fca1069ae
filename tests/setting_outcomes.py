"""What becomes of a config, as `test_settings_arrive` sees it: built objects, batches, losses, whole runs."""

import inspect
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml

from deepvit.config.records import read_json_lines
from deepvit.data import source_of
from deepvit.engine import checkpoint
from deepvit.engine.progress import Display
from deepvit.engine.ranks import Ranks
from deepvit.engine.signals import StopRequest
from deepvit.errors import Failure, UserError
from deepvit.run import build, launch, measures, micro_batches

ALONE = Ranks(0, 1, torch.device("cpu"))
DATA: dict[str, Path] = {}  # what stands for a path in an override -> the path; TMP: where runs may go


class Run:
    """A composed config, and what the functions that a run is built by make of it; `begun` as for `build.build`."""

    def __init__(self, config: dict[str, Any], begun: dict[str, Any] | None = None):
        self.config, self.begun = config, begun
        self.settings = build.read_settings(config)
        build.check(self.settings, ALONE)

    @cached_property
    def splits(self):
        return source_of(self.settings.data).splits()

    @cached_property
    def built(self):
        return build.build(self.settings, ALONE, self.begun)

    def batches(self, steps: int = 2):
        return self.built.make_batches(0, steps)


# What is to change with a setting.

def trained_parameters(run):
    return sum(parameter.requires_grad for parameter in run.built.model.parameters())


def option(name: str) -> Callable:
    """A keyword of the optimizer, the same for all its parameters."""
    return lambda run: run.built.state.optimizer.param_groups[0][name]


def initial(run):
    return torch.cat([parameter.detach().flatten() for parameter in run.built.model.parameters()]).tolist()


def classes(run):
    return run.splits.class_ids


def sizes(run):
    return len(run.splits.train), len(run.splits.val)


def kinds_of_images(run):
    """Of both splits, as they are read and as they are kept in memory."""
    kinds = [type(part.image(0)).__name__ for part in (run.splits.train, run.splits.val)]
    run.splits.val.cache_decoded()
    return *kinds, type(run.splits.val.image(0)).__name__


def rates(run):
    schedule = run.built.stepper.schedule
    return [schedule(step) for step in range(1, schedule.total + 1)]


def plan(name: str) -> Callable:
    return lambda run: getattr(run.built.plan, name)


def images(run):
    """Training images as the workers make them."""
    return [micro.images.tolist() for step in run.batches() for micro in step]


def image_by_image(run):
    """An epoch of training images in the order of the set."""
    micro_batches = [micro for step in run.batches(3) for micro in step]
    order = torch.cat([micro.indices for micro in micro_batches]).argsort()
    return torch.cat([micro.images for micro in micro_batches])[order].tolist()


def filling(run):
    """The colour that the augmentation fills an image's corners with."""
    (policy,) = build.train_transform(run.settings.data, run.settings.augment).colour[1:]
    return policy.ops[0].hparams["img_mean"]


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


def gradient_scale(run):
    """Of the backward pass, which is taken back before the step."""
    bias, during = run.built.model.head.bias, []
    bias.register_hook(during.append)
    run.built.stepper.update(run.built.state, next(run.batches()))
    return (during[0].norm() / bias.grad.norm()).round().item()


def noise(run):
    """What a device erases with."""
    return inspect.getclosurevars(run.built.make_batches.func).nonlocals["on_device"].noise[:9].tolist()


def drawn_in_an_update(run):
    next(run.built.stepper.seeded(next(run.batches()), 0))
    return torch.rand(3).tolist()


def trained(run):
    """Losses of three updates, and the weights after them that count."""
    state, stepper = run.built.state, run.built.stepper
    losses = [stepper.update(state, batch)[1].loss.item() for batch in run.batches(3)]
    return losses, [parameter.tolist() for parameter in state.evaluated_model.parameters()]


def evaluated(run):
    evaluate = measures.evaluator(run.built, StopRequest())
    return evaluate(run.built.model, Display(False)).confidences.tolist()


def calibrated(run):
    """The statistics that an evaluation leaves."""
    evaluated(run)
    return [buffer.tolist() for buffer in run.built.model.buffers()]


def calibrated_images(run):
    batches = measures.evaluator(run.built, StopRequest()).calibration
    return sum(map(len, batches())) if batches else 0


def calibration_workers(run):
    return processes_of(measures.evaluator(run.built, StopRequest()).calibration())


def first_probe_is_as_later_ones(run):
    measure = measures.attention_metrics(run.built)
    return measure(run.built.model, 0)[0] == measure(run.built.model, 1)[0]


def probed(run):
    return measures.attention_metrics(run.built)(run.built.model, 1)[0]


def kept_batches(run):
    """Whether evaluation makes its batches once."""
    batches = build.eval_batches(run.settings.data, run.splits.val, ALONE)
    return next(batches()) is next(batches())


def in_memory(run):
    return run.splits.train.cache_decoded()


def workers(run):
    return processes_of(run.batches(8))


def evaluating_workers(run):
    return processes_of(build.eval_batches(run.settings.data, run.splits.val, ALONE)())


def processes_of(batches: Iterator[Any]) -> int:
    """Those that load images, once the first batch is there."""
    next(batches)
    count = len(multiprocessing.active_children())
    batches.close()
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


def compiled_in_mode(run):
    with mock.patch("torch.compile") as compile_model:
        assert run.built
    return compile_model.call_args and compile_model.call_args.kwargs["mode"]


def sizes_tried(run):
    """Images at once of which the largest that fit are taken."""
    with mock.patch.object(micro_batches, "largest_batch", return_value=(2, "")) as largest:
        assert run.built
    return largest.call_args and largest.call_args.args[0]


def smallest_micro_batch(run):
    """Images that an update still takes together where no number of them fits into memory."""
    sizes = []

    def run_out(x):
        sizes.append(len(x))
        assert len(sizes) < 9  # and no end
        raise torch.OutOfMemoryError

    run.built.stepper.network = run_out
    with suppress(UserError):
        run.built.stepper.update(run.built.state, next(run.batches()))
    return sizes[-1]


def is_checkpointing_advised(run):
    """Where too many images were taken at once."""
    return "engine.grad_checkpointing" in run.built.stepper.advice(run.built.state, 2)


def blocks_passed(run):
    """Forward passes of a block in one update: checkpointing repeats them."""
    calls = []
    run.built.model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    run.built.stepper.update(run.built.state, next(run.batches()))
    return len(calls)


def joined(run):
    """What a rank is joined with."""
    with mock.patch("deepvit.engine.ranks.join") as join, mock.patch.object(launch, "program"):
        launch.run_rank("train", run.config, Path(tempfile.mkdtemp(dir=DATA["TMP"])))
    return join.call_args.args


def launched(run):
    """(processes, restarts) that torch's launcher is asked for."""
    with mock.patch("torch.distributed.launcher.api.elastic_launch") as elastic:
        folder = Path(tempfile.mkdtemp(dir=DATA["TMP"]))
        launch.launcher(run.config, folder)("train", run.config, folder)
    return elastic.call_args and (elastic.call_args.args[0].nproc_per_node, elastic.call_args.args[0].max_restarts)


def launched_beside_gpus(run):
    """The same on a machine with two GPUs."""
    with (mock.patch("torch.cuda.is_available", return_value=True),
          mock.patch("torch.cuda.device_count", return_value=2), mock.patch.object(launch, "run_rank")):
        return launched(run)


def finished(run) -> Path:
    """The folder of the whole run."""
    folder = Path(tempfile.mkdtemp(dir=DATA["TMP"])) / "run"
    launch.program("train", run.config, folder)(run.config, ranks=ALONE, stop=StopRequest())
    return folder


def made_again(run):
    """Whether the same command makes another run of a finished one."""
    result = finished(run) / "metrics.json"
    before = result.stat().st_mtime_ns
    launch.program("train", run.config, result.parent)(run.config, ranks=ALONE, stop=StopRequest())
    return result.stat().st_mtime_ns != before


def dtype_after_bfloat16(run):
    """That of `auto` in the folder of a run that was finished in bfloat16."""
    folder = finished(_changed(run, "precision", dtype="bfloat16"))
    launch.program("train", run.config, folder)(run.config, ranks=ALONE, stop=StopRequest())
    return yaml.safe_load((folder / "config.yaml").read_text())["precision"]["dtype"]


def _changed(run: Run, group: str, **values: Any) -> Run:
    return Run({**run.config, "fresh": False, group: {**run.config[group], **values}})


def left_of_a_finished_run(run):
    """The checkpoints of a run that was finished with `engine.keep=all`, after this command."""
    folder = finished(_changed(run, "engine", keep="all"))
    launch.program("train", run.config, folder)(run.config, ranks=ALONE, stop=StopRequest())
    return sorted(path.name for path in folder.glob("checkpoints/*.pt"))


def skipped(run):
    """Updates that were skipped before a run of nothing but nan was over."""
    folder = Path(tempfile.mkdtemp(dir=DATA["TMP"])) / "run"
    with suppress(Failure):
        launch.program("train", run.config, folder)(run.config, ranks=ALONE, stop=StopRequest())
    return sum(line["event"] == "skipped" for line in read_json_lines(folder / "events.jsonl"))


def recorded_origin(run):
    folder = finished(run)
    return tuple(yaml.safe_load((folder / name).read_text()).get("origin") for name in ("config.yaml", "metrics.json"))


def whole(run):
    """The files of a run's folder and the steps of its metrics."""
    folder = finished(run)
    lines = read_json_lines(folder / "metrics.jsonl")
    checkpoints = sorted(folder.glob("checkpoints/*.pt"))
    return {"files": sorted(path.name.partition(".out.")[0] for path in folder.glob("*")),  # without the clock
            "kept": [path.name for path in checkpoints if path.name.startswith("step-")],
            "checkpoints": [path.name for path in checkpoints],
            "saved": [checkpoint.load(path)["step"] for path in checkpoints if path.stem in ("previous", "last")],
            "profiled": sorted(path.name for path in folder.glob("profile/*.txt")),
            "logged": [line["step"] for line in lines if "lr" in line],
            "probed": [line["step"] for line in lines if "probe" in line],
            "probe": [line["probe"] for line in lines if "probe" in line],
            "evaluated": [line["step"] for line in lines if "top1" in line],
            "losses": [line["loss"] for line in lines if "top1" in line]}


def part_of_whole(name: str) -> Callable:
    return lambda run: whole(run)[name]
