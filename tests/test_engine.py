"""The parts of the engine against closed forms, other people's numbers and invariants."""

import json
import logging
import math
import os
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import soak
import torch
from scipy import stats
from torch import nn

from deepvit.config.records import read_json_lines
from deepvit.engine import checkpoint
from deepvit.engine.evaluate import Evaluation, evaluate, mcnemar, wilson_interval
from deepvit.engine.folder import RunFolder, plain
from deepvit.engine.progress import Meter
from deepvit.engine.ranks import Ranks
from deepvit.engine.schedule import Schedule, is_due
from deepvit.engine.step import Precision
from deepvit.errors import DONE, Failure, UserError
from deepvit.run.eval_results import compare
from deepvit.run.launch import run_rank

ALONE = Ranks(0, 1, torch.device("cpu"))
DATA = Path(__file__).parent / "data" / "engine"


# Schedule

@pytest.mark.parametrize("case", json.loads((DATA / "schedules.json").read_text()),
                         ids=lambda case: f"{case['decay']}-{case['warmup_steps']}-{case['total_steps']}")
def test_schedule_of_vit_pytorch(case):
    """Its update number k runs with our rate of step k."""
    schedule = Schedule(case["base_lr"], case["total_steps"], case["warmup_steps"], kind=case["decay"])
    for step, rate in case["lr_at_update"].items():
        assert schedule(int(step)) == pytest.approx(rate, rel=1e-12, abs=1e-15)


def test_schedule_of_the_published_recipe():
    """timm's cosine counts its decay from the start of the run, beside the warm-up, and rests at min_lr."""
    schedule = Schedule(5e-4, 300, 3, cooldown_steps=10, warmup_lr=1e-6, min_lr=1e-5, decay_from="start")
    assert schedule.total == 310
    assert schedule(1) == pytest.approx(1e-6 + (5e-4 - 1e-6) / 3)
    for step in (3, 100, 299):
        assert schedule(step) == pytest.approx(1e-5 + (5e-4 - 1e-5) * 0.5 * (1 + math.cos(math.pi * step / 300)))
    assert schedule(300) == schedule(310) == pytest.approx(1e-5)


def test_what_is_due():
    assert [step for step in range(1, 11) if is_due(step, 4, 10)] == [4, 8, 10]
    assert [step for step in range(1, 11) if is_due(step, None, 10)] == [10]


# Checkpoints and folders

def content(step: int) -> dict:
    return {"step": step, "model": {"w": torch.full((1000,), float(step))}}


def test_checkpoints_rotate_and_verify(tmp_path):
    last, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    for step in (1, 2, 3):
        checkpoint.save(last, content(step), previous)
    assert (checkpoint.load(last)["step"], checkpoint.load(previous)["step"]) == (3, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "last.pt.sha256", "previous.pt",
                                                                "previous.pt.sha256"]
    assert checkpoint.load_newest(last, previous)[0] == last
    assert checkpoint.load_newest(tmp_path / "none.pt") is None


@pytest.mark.parametrize("cut", range(9))
def test_a_kill_between_any_two_steps_of_a_save_leaves_a_whole_checkpoint(tmp_path, monkeypatch, cut):
    """Every rename and removal of a save in turn is the last thing that happens."""
    last, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    for step in (1, 2):
        checkpoint.save(last, content(step), previous)
    happened = 0

    class Killed(BaseException):
        pass

    def counted(original):
        def call(*arguments, **options):
            nonlocal happened
            if happened == cut:
                raise Killed
            happened += 1
            return original(*arguments, **options)
        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", counted(os.replace))
        patch.setattr(Path, "unlink", counted(Path.unlink))
        patch.setattr(os, "fsync", counted(os.fsync))
        try:
            checkpoint.save(last, content(3), previous)
        except Killed:
            pass
    assert checkpoint.load_newest(last, previous)[1]["step"] in (2, 3)
    checkpoint.save(last, content(4), previous)
    assert checkpoint.load_newest(last, previous)[1]["step"] == 4


@pytest.mark.parametrize("harm", ["cut", "zero", "flip", "empty"])
@pytest.mark.parametrize("with_digest", [True, False])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, harm, with_digest):
    path = tmp_path / "last.pt"
    checkpoint.save(path, content(1))
    whole = path.read_bytes()
    at = whole.index(content(1)["model"]["w"].numpy().tobytes())  # torch reads what is there; sha256 alone knows better
    path.write_bytes({"cut": whole[:len(whole) // 2], "zero": bytes(len(whole)), "empty": b"",
                      "flip": whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:]}[harm])
    if not with_digest:
        checkpoint.digest_path(path).unlink()
        if harm == "flip":
            checkpoint.load(path)  # without its sha256 a flipped bit passes: that is what it is for
            return
    with pytest.raises(UserError, match="last.pt.*sha256" if with_digest else "last.pt"):
        checkpoint.load(path)


class Poison:
    def __reduce__(self):
        return os.system, ("touch /tmp/deepvit-poisoned",)


def test_a_poisoned_checkpoint_is_refused_and_nothing_runs(tmp_path):
    torch.save({"format": "deepvit", "model": Poison()}, tmp_path / "bad.pt")
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.load(tmp_path / "bad.pt")
    torch.save({"state_dict": {}}, tmp_path / "foreign.pt")
    with pytest.raises(UserError, match="init="):
        checkpoint.load(tmp_path / "foreign.pt")
    assert not Path("/tmp/deepvit-poisoned").exists()


def test_folder_has_one_owner_and_mends_torn_lines(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.claim()
    with pytest.raises(UserError, match="in use by this very process"):
        RunFolder(tmp_path / "run").claim()
    for step in (1, 2, 3):
        folder.log_metrics({"step": step, "loss": 1 / 3, "grad_norm": float("inf")})
    with folder.metrics.open("a") as file:
        file.write('{"step": 4, "lo')
    folder.drop_metrics_after(2, 0)
    folder.log_metrics({"step": 3})
    assert read_json_lines(folder.metrics) == [{"step": 1, "loss": 1 / 3, "grad_norm": None},
                                                     {"step": 2, "loss": 1 / 3, "grad_norm": None}, {"step": 3}]
    (folder.checkpoints / "last.pt.tmp").write_text("half")
    folder.release()
    folder.claim()
    assert not list(folder.path.rglob("*.tmp"))
    folder.release()
    assert plain({"a": [1.0, float("nan")]}) == {"a": [1.0, None]}


def test_meter_leaves_pauses_out():
    meter = Meter()
    with meter.paused():
        threading.Event().wait(0.05)
    meter.add(10, 0.0)
    assert meter.read()["images_per_s"] > 10 / 0.05


def test_no_save_counts_as_time_of_training(tmp_path, monkeypatch):
    """Not the first one either, which comes before the first step."""
    inside, saved, paused, save = [], [], Meter.paused, checkpoint.Saver.save_last

    @contextmanager
    def noted(meter):
        with paused(meter):
            inside.append(meter)
            yield
            inside.pop()

    monkeypatch.setattr(Meter, "paused", noted)
    monkeypatch.setattr(checkpoint.Saver, "save_last",
                        lambda *given, **options: saved.append(bool(inside)) or save(*given, **options))
    config = soak.compose("schedule.steps=2", "schedule.warmup_steps=1", "engine.save_every=1", "data.fraction=0.1")
    assert run_rank("train", config, tmp_path / "run").code == DONE and saved == [True] * 3


# Evaluation

@dataclass
class Images:
    images: torch.Tensor
    targets: torch.Tensor
    indices: torch.Tensor
    bad: list = field(default_factory=list)
    refused: int = 0

    def __len__(self) -> int:
        return len(self.targets)

    def split(self, size: int) -> "list[Images]":
        return [Images(*parts) for parts in zip(self.images.split(size), self.targets.split(size),
                                                self.indices.split(size), strict=True)]


@dataclass
class Shares(Ranks):
    """Stands for one rank among several that run one after the other: `gather` sees what all of them gave."""

    given: list = field(default_factory=list)

    def gather(self, value):
        if value is None or isinstance(value, Exception):  # no error, or one
            return [value]
        self.given.append(value)
        return list(self.given)


def take(batch, step, device, training):
    return batch.images, batch.targets


@pytest.mark.parametrize("n", [1, 7, 10, 50])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_evaluation_counts_every_image_once(n, world):
    """Top-1 and top-5 by hand, whatever the ranks and a short last batch."""
    torch.manual_seed(n)
    logits, targets = torch.randn(n, 10), torch.randint(10, (n,))
    shared, model = [], nn.Identity()
    for rank in range(world):
        first, end = n * rank // world, n * (rank + 1) // world
        batches = [Images(logits[at:min(at + 4, end)], targets[at:min(at + 4, end)],
                            torch.arange(at, min(at + 4, end))) for at in range(first, end, 4)]
        ranks = Shares(rank, world, torch.device("cpu"), given=shared)
        try:
            result = evaluate(model, batches, take, ranks, Precision(), n=n)
        except (Failure, IndexError):
            assert rank < world - 1  # not all have given theirs yet
    order = logits.argsort(-1, descending=True)
    assert result.correct1 == int((order[:, 0] == targets).sum())
    assert result.correct5 == int((order[:, :5] == targets[:, None]).any(1).sum())
    assert result.loss == pytest.approx(float(nn.functional.cross_entropy(logits, targets)), abs=1e-6)
    assert np.array_equal(result.targets, targets)


def test_evaluation_refuses_an_image_too_many_and_scores_nan_as_wrong():
    logits, targets = torch.eye(10)[:4], torch.arange(4)
    batch = Images(logits.clone(), targets, torch.arange(4))
    with pytest.raises(Failure, match="saw 8 images"):
        evaluate(nn.Identity(), [batch, batch], take, ALONE, Precision(), n=4)
    batch.images[0] = float("nan")
    result = evaluate(nn.Identity(), [batch], take, ALONE, Precision(), n=4)
    assert (result.correct1, result.n) == (3, 4)


class Small(nn.Module):
    """Has memory for three images."""

    def forward(self, x):
        if len(x) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x


def test_evaluation_halves_what_does_not_fit():
    """Also a bad image in the second half is counted as wrong."""
    logits, targets = torch.eye(10), torch.arange(10)
    batch = Images(logits, targets, torch.arange(10), bad=[Wrong(9)])
    result = evaluate(Small(), [batch], take, ALONE, Precision(), n=10)
    assert (result.correct1, result.n) == (9, 10) and len(result.bad) == 1


@dataclass
class Wrong:
    index: int


@pytest.mark.parametrize(("correct", "n"), [(0, 10), (7, 10), (10, 10), (38123, 50000)])
def test_wilson_interval(correct, n):
    expected = stats.binomtest(correct, n).proportion_ci(0.95, method="wilson")
    assert wilson_interval(correct, n) == pytest.approx((expected.low, expected.high), abs=1e-7)


def test_the_comparison_names_the_right_model(caplog, monkeypatch):
    """Who got what right, and what McNemar makes of it: 2 of the first alone, 7 of the second alone."""
    def seen(wrong):
        predictions = np.where(np.isin(np.arange(20), wrong), 1, 0)[:, None]
        return Evaluation(20, 20 - len(wrong), 20, 0.0, 1.0, [], np.zeros(20, int), predictions)

    monkeypatch.setattr(logging.getLogger("deepvit"), "propagate", True)
    caplog.set_level(logging.INFO)
    compare([(Path("A.pt"), "same", None, seen([0, 1, 2, 3, 4, 5, 6, 9])),
              (Path("B.pt"), "same", None, seen([7, 8, 9]))])
    said = caplog.messages[0]
    assert re.search(r"A\.pt.*B\.pt.*only the first .*\b2\b.*only the second .*\b7\b", said)
    assert f"{2 * sum(math.comb(9, k) for k in range(3)) / 2**9:.3g}" in said


@pytest.mark.parametrize(("first", "second"), [(0, 0), (5, 5), (1, 9), (30, 61), (400, 460)])
def test_mcnemar(first, second):
    a = np.array([True] * first + [False] * second + [True, False])
    b = np.array([False] * first + [True] * second + [True, False])
    expected = stats.binomtest(min(first, second), first + second).pvalue if first + second else 1.0
    assert mcnemar(a, b) == {"only_first": first, "only_second": second, "p": pytest.approx(expected, abs=1e-12)}
