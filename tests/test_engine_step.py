"""One update, and the state that it changes, against closed forms and other people's numbers."""

from dataclasses import replace

import numpy as np
import oracles
import pytest
import torch
from test_engine import ALONE, Pictures, take
from timm.utils import ModelEmaV3
from torch import nn

from deepvit.engine import checkpoint
from deepvit.engine.nonfinite import examine
from deepvit.engine.ranks import Ranks
from deepvit.engine.schedule import Schedule
from deepvit.engine.state import TrainState
from deepvit.engine.step import Precision, Stepper
from deepvit.errors import UserError

GPU = Ranks(0, 1, torch.device("cuda", 0))


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
                      ModelEmaV3(model, 0.9, exclude_buffers=True) if ema else None)


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
    assert float(one.loss) == pytest.approx(float(four.loss), abs=1e-6)
    for (name, left), right in zip(whole.named_parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(left.grad, right.grad, atol=1e-6, rtol=0, msg=name)
        torch.testing.assert_close(left, right, atol=1e-6, rtol=0, msg=name)


def test_clipping_scales_to_the_norm_and_reports_the_one_before():
    model = Net()
    before = [weight.detach().clone() for weight in model.parameters()]
    result = stepper_of(model, Schedule(1.0, 10, kind="constant"), clip=1e-3).update(state_of(model), [a_batch()])
    moved = torch.cat([(old - new).flatten() for old, new in zip(before, model.parameters(), strict=True)])
    assert float(result.grad_norm) > 1e-2
    assert float(moved.detach().norm()) == pytest.approx(1e-3, rel=1e-2)


OPTIMIZERS = {
    "sgd": lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9),
    "fused sgd": lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9, fused=True),
    "fused adamw": lambda weights: torch.optim.AdamW(weights, lr=0.1, fused=True),
}


def bits(state: TrainState) -> dict[str, torch.Tensor]:
    """Copies of all tensors that a checkpoint would hold."""
    optimizer = {f"{name}.{number}": value for number, part in state.optimizer.state_dict()["state"].items()
                 for name, value in part.items()}
    parts = {"model": state.model.state_dict(), "ema": state.ema.module.state_dict(), "optimizer": optimizer}
    return {f"{part}.{name}": value.clone() for part, tensors in parts.items() for name, value in tensors.items()}


def assert_same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def bad_batch(poison: float = float("nan")) -> Pictures:
    bad = a_batch()
    bad.images[5, 2] = poison
    return bad


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("made_before", [0, 1])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_skipped_update_leaves_every_bit(optimizer, made_before, poison):
    """Weights, BatchNorm's running statistics and its counter, moments, the average, the schedule's clock."""
    model = Net(nn.BatchNorm1d)
    state = state_of(model, ema=True)
    state.optimizer = OPTIMIZERS[optimizer](model.parameters())
    stepper = stepper_of(model, Schedule(0.1, 10, kind="constant"))
    for _ in range(made_before):
        assert not stepper.update(state, [a_batch()]).skipped
    before = bits(state)
    assert stepper.update(state, [bad_batch(poison)]).skipped
    assert (state.step, state.batch, state.skipped_in_a_row) == (made_before, made_before + 1, 1)
    assert_same_bits(bits(state), before)
    assert not stepper.update(state, [a_batch()]).skipped
    assert (state.step, state.batch, state.skipped_in_a_row) == (made_before + 1, made_before + 2, 0)
    assert all(torch.isfinite(value).all() for value in bits(state).values())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_update_may_be_settled_during_the_next(optimizer):
    """As the loop does it: the passes of batch k before it is known what became of k - 1; no bit is another."""
    torch.manual_seed(0)
    batches = [bad_batch() if number in (0, 3, 4, 7) else Pictures(torch.randn(32, 6), torch.randint(3, (32,)), None)
               for number in range(10)]
    first = Net(nn.BatchNorm1d)
    seen = []
    for overlapping in (False, True):
        model = Net(nn.BatchNorm1d)
        model.load_state_dict(first.state_dict())
        state = state_of(model, ema=True)
        state.optimizer = OPTIMIZERS[optimizer](model.parameters())
        stepper = stepper_of(model, Schedule(0.1, 10, 3))
        under_way = None
        for batch in batches:
            update = stepper.backward(state, [batch])
            if under_way:
                stepper.settle(state, under_way)
            stepper.step(state, update)
            under_way = update
            if not overlapping:
                stepper.settle(state, update)
                under_way = None
        if under_way:
            stepper.settle(state, under_way)
        assert (state.step, state.batch, state.skipped_in_a_row) == (6, 10, 0)
        seen.append(bits(state))
    assert_same_bits(*seen)


def test_an_update_given_up_between_micro_batches_leaves_every_bit():
    model = Net(nn.BatchNorm1d)
    state = state_of(model, ema=True)
    stepper = stepper_of(model, Schedule(0.1, 10, kind="constant"))
    stepper.update(state, [a_batch()])
    before, asked = bits(state), []
    assert stepper.backward(state, parts_of(a_batch(), 8), lambda: bool(asked.append(1) or len(asked) == 2)) is None
    assert len(asked) == 2 and (state.step, state.batch) == (1, 1)
    assert_same_bits(bits(state), before)
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("scaled", [False, True])
def test_the_host_never_waits_for_the_gpu_within_an_update(scaled):
    model = Net(nn.BatchNorm1d).cuda()
    state = state_of(model, ema=True)
    state.optimizer = OPTIMIZERS["fused adamw"](model.parameters())
    state.scaler = torch.amp.GradScaler("cuda", enabled=scaled)
    stepper = replace(stepper_of(model, Schedule(0.1, 10, kind="constant"), clip=1.0), ranks=GPU,
                      precision=Precision(torch.float16 if scaled else torch.bfloat16, scaled))
    batch = a_batch()
    batch = Pictures(batch.images.cuda(), batch.targets.cuda(), batch.indices)
    for _ in range(3):
        stepper.update(state, [batch])  # makes moments and the scale
    under_way = stepper.backward(state, [batch])
    stepper.step(state, under_way)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            update = stepper.backward(state, [batch])
            stepper.settle(state, under_way)
            stepper.step(state, update)
            under_way = update
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_an_overflow_of_the_gradient_scaler_is_no_step():
    """The scale halves, the schedule's clock stands still (R11)."""
    model = Net()
    state = state_of(model)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    stepper = stepper_of(model, Schedule(0.1, 10, kind="constant"))
    weights = [weight.detach().clone() for weight in model.parameters()]
    bad = a_batch()
    bad.images *= 1e4
    assert stepper.update(state, [bad]).skipped
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
        assert float(left.loss).hex() == float(right.loss).hex()
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
        assert float(result.loss) == pytest.approx(float(expected), abs=1e-5)
        assert float(result.grad_norm) == pytest.approx(float(io["grad_norm_before_clip"][update]), abs=1e-5)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(float(io["lr"][update]), rel=1e-6, abs=1e-12)
    model.eval()
    torch.testing.assert_close(model(io["x_nchw"][0]), io["final_logits_microbatch0"], atol=1e-5, rtol=0)
    torch.testing.assert_close(model.head.weight, io["final_head_weight"], atol=1e-5, rtol=0)
