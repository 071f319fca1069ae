"""The parts of the engine against closed forms, other people's numbers and invariants."""

import json
import math
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import oracles
import pytest
import torch
from scipy import stats
from timm.utils import ModelEmaV3
from torch import nn

from deepvit.engine import checkpoint
from deepvit.engine.evaluate import evaluate, mcnemar, wilson_interval
from deepvit.engine.folder import RunFolder, plain, read_json_lines
from deepvit.engine.nonfinite import examine
from deepvit.engine.progress import Meter
from deepvit.engine.ranks import Ranks
from deepvit.engine.schedule import Schedule, is_due
from deepvit.engine.state import TrainState
from deepvit.engine.step import Precision, Stepper
from deepvit.errors import Failure, UserError

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
    at = whole.rfind(b"PK\x01\x02") + 20  # in the zip's directory, which torch reads; sha256 covers the rest
    path.write_bytes({"cut": whole[:len(whole) // 2], "zero": bytes(len(whole)), "empty": b"",
                      "flip": whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:]}[harm])
    if not with_digest:
        checkpoint.digest_path(path).unlink()
        if harm == "flip":
            return  # without its sha256 a flipped bit may pass: that is what it is for
    with pytest.raises(UserError, match="last.pt"):
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
    folder.drop_metrics_after(2)
    folder.log_metrics({"step": 3})
    assert list(read_json_lines(folder.metrics)) == [{"step": 1, "loss": 1 / 3, "grad_norm": None},
                                                     {"step": 2, "loss": 1 / 3, "grad_norm": None}, {"step": 3}]
    (folder.checkpoints / "last.pt.tmp").write_text("half")
    folder.release()
    folder.claim()
    assert not list(folder.path.rglob("*.tmp"))
    folder.release()
    assert plain({"a": [1.0, float("nan")]}) == {"a": [1.0, None]}


def test_meter_leaves_pauses_out():
    meter = Meter()
    meter.pause()
    threading.Event().wait(0.05)
    meter.resume()
    meter.add(10, 0.0)
    assert meter.read()["images_per_s"] > 10 / 0.05


# Evaluation

@dataclass
class Pictures:
    images: torch.Tensor
    targets: torch.Tensor
    indices: torch.Tensor
    bad: list = field(default_factory=list)
    refused: int = 0

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True)
class Shares(Ranks):
    """Stands for one rank among several that run one after the other: `gather` sees what all of them gave."""

    given: list = field(default_factory=list)

    def gather(self, value):
        if isinstance(value, tuple) and len(value) == 3:
            return [value]
        self.given.append(value)
        return list(self.given)


def take(batch, step, device, training):
    return batch.images, batch.targets


@pytest.mark.parametrize("n", [1, 7, 10, 50])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_evaluation_counts_every_picture_once(n, world):
    """Top-1 and top-5 by hand, whatever the ranks and a short last batch."""
    torch.manual_seed(n)
    logits, targets = torch.randn(n, 10), torch.randint(10, (n,))
    shared, model = [], nn.Identity()
    for rank in range(world):
        first, end = n * rank // world, n * (rank + 1) // world
        batches = [Pictures(logits[at:min(at + 4, end)], targets[at:min(at + 4, end)],
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
    assert np.array_equal(result.indices, np.arange(n))


def test_evaluation_refuses_a_picture_too_many_and_scores_nan_as_wrong():
    logits, targets = torch.eye(10)[:4], torch.arange(4)
    batch = Pictures(logits.clone(), targets, torch.arange(4))
    with pytest.raises(Failure, match="saw 8 pictures"):
        evaluate(nn.Identity(), [batch, batch], take, ALONE, Precision(), n=4)
    batch.images[0] = float("nan")
    result = evaluate(nn.Identity(), [batch], take, ALONE, Precision(), n=4)
    assert (result.correct1, result.n) == (3, 4)


@pytest.mark.parametrize(("correct", "n"), [(0, 10), (7, 10), (10, 10), (38123, 50000)])
def test_wilson_interval(correct, n):
    expected = stats.binomtest(correct, n).proportion_ci(0.95, method="wilson")
    assert wilson_interval(correct, n) == pytest.approx((expected.low, expected.high), abs=1e-7)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (5, 5), (1, 9), (30, 61), (400, 460)])
def test_mcnemar(first, second):
    a = np.array([True] * first + [False] * second + [True, False])
    b = np.array([False] * first + [True] * second + [True, False])
    expected = stats.binomtest(min(first, second), first + second).pvalue if first + second else 1.0
    assert mcnemar(a, b) == {"only_first": first, "only_second": second, "p": pytest.approx(expected, abs=1e-12)}


# Updates

class Net(nn.Module):
    """LayerNorm or BatchNorm between two layers."""

    def __init__(self, norm: type[nn.Module] = nn.LayerNorm):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 8), norm(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.second(torch.relu(self.norm(self.first(x))))


def state_of(model: nn.Module, ema: bool = False, lr: float = 0.1) -> TrainState:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return TrainState(model, optimizer, torch.amp.GradScaler("cpu", enabled=False),
                      ModelEmaV3(model, 0.9) if ema else None)


def stepper_of(model: nn.Module, schedule: Schedule, clip: float | None = None) -> Stepper:
    def cross_entropy(network, x, y):
        return nn.functional.cross_entropy(network(x), y)

    return Stepper(model, take, cross_entropy, schedule, Precision(), ALONE, seed=0, clip_grad=clip)


def a_batch(n: int = 32) -> Pictures:
    torch.manual_seed(3)
    return Pictures(torch.randn(n, 6), torch.randint(3, (n,)), torch.arange(n))


def parts_of(batch: Pictures, size: int) -> list[Pictures]:
    return [Pictures(*parts) for parts in zip(batch.images.split(size), batch.targets.split(size),
                                              batch.indices.split(size), strict=True)]


def test_accumulation_of_four_times_eight_is_a_batch_of_thirty_two():
    whole, cut = (Net() for _ in range(2))
    cut.load_state_dict(whole.state_dict())
    schedule = Schedule(0.1, 10, kind="constant")
    one = stepper_of(whole, schedule).update(state_of(whole), [a_batch()])
    four = stepper_of(cut, schedule).update(state_of(cut), parts_of(a_batch(), 8))
    assert float(one["loss"]) == pytest.approx(float(four["loss"]), abs=1e-6)
    for (name, left), right in zip(whole.named_parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(left.grad, right.grad, atol=1e-6, rtol=0, msg=name)
        torch.testing.assert_close(left, right, atol=1e-6, rtol=0, msg=name)


def test_clipping_scales_to_the_norm_and_reports_the_one_before():
    model = Net()
    before = [weight.detach().clone() for weight in model.parameters()]
    result = stepper_of(model, Schedule(1.0, 10, kind="constant"), clip=1e-3).update(state_of(model), [a_batch()])
    moved = torch.cat([(old - new).flatten() for old, new in zip(before, model.parameters(), strict=True)])
    assert float(result["grad_norm"]) > 1e-2
    assert float(moved.detach().norm()) == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_skipped_update_leaves_every_bit(poison):
    """Weights, BatchNorm's running statistics and its counter, moments, the average, the schedule's clock."""
    model = Net(nn.BatchNorm1d)
    state = state_of(model, ema=True)
    stepper = stepper_of(model, Schedule(0.1, 10, kind="constant"))
    assert not stepper.update(state, [a_batch()])["skipped"]
    before = {name: value.clone() for name, value in [*model.state_dict().items(), *(
        (f"ema.{name}", value) for name, value in state.ema.module.state_dict().items())]}
    moments = [group["momentum_buffer"].clone() for group in state.optimizer.state.values()]
    bad = a_batch()
    bad.images[5, 2] = poison
    assert stepper.update(state, [bad])["skipped"]
    assert (state.step, state.batch, state.skipped_in_a_row) == (1, 2, 1)
    for name, value in before.items():
        now = state.ema.module if name.startswith("ema.") else model
        assert torch.equal(now.state_dict()[name.removeprefix("ema.")], value), name
    assert all(torch.equal(old, group["momentum_buffer"])
               for old, group in zip(moments, state.optimizer.state.values(), strict=True))
    assert not stepper.update(state, [a_batch()])["skipped"]
    assert (state.step, state.batch, state.skipped_in_a_row) == (2, 3, 0)


def test_an_overflow_of_the_gradient_scaler_is_no_step():
    """The scale halves, the schedule's clock stands still (R11)."""
    model = Net()
    state = state_of(model)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    stepper = stepper_of(model, Schedule(0.1, 10, kind="constant"))
    weights = [weight.detach().clone() for weight in model.parameters()]
    bad = a_batch()
    bad.images *= 1e4
    assert stepper.update(state, [bad])["skipped"]
    assert state.scaler.get_scale() == 2.0**126 and (state.step, state.batch) == (0, 1)
    assert all(torch.equal(old, new) for old, new in zip(weights, model.parameters(), strict=True))


def test_state_goes_through_a_checkpoint_bit_by_bit(tmp_path):
    model, other = Net(nn.BatchNorm1d), Net(nn.BatchNorm1d)
    state, again = state_of(model, ema=True), state_of(other, ema=True, lr=0.05)
    schedule = Schedule(0.1, 10, 2)
    for _ in range(3):
        stepper_of(model, schedule).update(state, [a_batch()])
    checkpoint.save(tmp_path / "c.pt", state.state_dict())
    again.load_state_dict(checkpoint.load(tmp_path / "c.pt"))
    for _ in range(3):
        left = stepper_of(model, schedule).update(state, [a_batch()])
        right = stepper_of(other, schedule).update(again, [a_batch()])
        assert float(left["loss"]).hex() == float(right["loss"]).hex()
    assert all(torch.equal(one, two) for one, two in zip(
        [*model.state_dict().values(), *state.ema.module.state_dict().values()],
        [*other.state_dict().values(), *again.ema.module.state_dict().values()], strict=True))
    without = state_of(Net(nn.BatchNorm1d))
    with pytest.raises(UserError, match="ema.decay"):
        without.load_state_dict(checkpoint.load(tmp_path / "c.pt"))


def test_the_first_module_that_went_wrong_is_named():
    model = Net(nn.BatchNorm1d)
    statistics = model.norm.running_mean.clone()
    batch = a_batch()

    def loss():
        return nn.functional.cross_entropy(model(batch.images), batch.targets)

    assert examine(model, loss).first is None
    with torch.no_grad():
        model.norm.weight[0] = float("inf")
    assert examine(model, loss).first == "an input weight norm.weight (1 of 8 values)"
    with torch.no_grad():
        model.norm.weight[0] = 1
        model.second.weight.fill_(1e38)
    assert examine(model, loss).first.startswith("the output of second (")
    assert torch.equal(model.norm.running_mean, statistics)
    assert all(weight.grad is None for weight in model.parameters())


# Fine-tuning by ViT-pytorch's rule

def test_fine_tuning_follows_the_rule_of_vit_pytorch(tmp_path):
    """12 updates of two micro-batches: losses, gradient norms, rates and the final head, by the published code."""
    from deepvit import create_model
    from deepvit.importers import load_weights
    tensors, rule = oracles.oracle("other/finetune")
    np.savez(tmp_path / "weights.npz", **{name: value.numpy() for name, value in oracles.part(tensors, "file").items()})
    sizes, io = rule["config"], oracles.part(tensors, "io")
    model = create_model("vit_b16", img_size=32, patch_size=sizes["patch_size"], embed_dim=sizes["hidden_size"],
                         depth=sizes["num_layers"], num_heads=sizes["num_heads"], num_classes=sizes["num_classes"],
                         mlp_ratio=sizes["mlp_dim"] / sizes["hidden_size"])
    load_weights(model, tmp_path / "weights.npz", head="zero")
    optimizer = torch.optim.SGD(model.parameters(), lr=rule["lr"], momentum=rule["momentum"])
    state = TrainState(model, optimizer, torch.amp.GradScaler("cpu", enabled=False))
    schedule = Schedule(rule["lr"], rule["updates"], rule["warmup_steps"], kind=rule["decay"])
    stepper = stepper_of(model, schedule, clip=rule["max_grad_norm"])
    parts = rule["accumulation"]
    model.train()
    for update in range(rule["updates"]):
        batches = [Pictures(io["x_nchw"][i], io["y"][i].long(), torch.arange(4))
                   for i in range(update * parts, (update + 1) * parts)]
        result = stepper.update(state, batches)
        expected = io["micro_loss"][update * parts:(update + 1) * parts].mean()
        assert float(result["loss"]) == pytest.approx(float(expected), abs=1e-5)
        assert float(result["grad_norm"]) == pytest.approx(float(io["grad_norm_before_clip"][update]), abs=1e-5)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(float(io["lr"][update]), rel=1e-6, abs=1e-12)
    model.eval()
    torch.testing.assert_close(model(io["x_nchw"][0]), io["final_logits_microbatch0"], atol=1e-5, rtol=0)
    torch.testing.assert_close(model.head.weight, io["final_head_weight"], atol=1e-5, rtol=0)
