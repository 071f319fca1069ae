"""One update, and the state that it changes, against closed forms and other people's numbers."""

from dataclasses import replace

import numpy as np
import oracles
import pytest
import torch
from test_engine import ALONE, Images, take
from timm.utils import ModelEmaV3
from torch import nn

from deepvit.engine import checkpoint
from deepvit.engine.nonfinite import examine
from deepvit.engine.ranks import Ranks
from deepvit.engine.schedule import Schedule
from deepvit.engine.state import TrainState
from deepvit.engine.step import Precision, Status, Stepper, Update, allocate_moments
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
    return Stepper(model, take, schedule, Precision(), ALONE, seed=0, clip_grad=clip)


def made(stepper: Stepper, state: TrainState, batches: list[Images], **options) -> Update:
    """The update of these micro-batches, which must come about."""
    status, update = stepper.update(state, batches, **options)
    assert status is Status.DONE
    return update


def a_batch(n: int = 32) -> Images:
    torch.manual_seed(3)
    return Images(torch.randn(n, 6), torch.randint(3, (n,)), torch.arange(n))


def parts_of(batch: Images, size: int) -> list[Images]:
    return [Images(*parts) for parts in zip(batch.images.split(size), batch.targets.split(size),
                                              batch.indices.split(size), strict=True)]


def test_accumulation_of_four_times_eight_is_a_batch_of_thirty_two():
    whole, cut = (Net() for _ in range(2))
    cut.load_state_dict(whole.state_dict())
    schedule = Schedule(0.1, 10, kind="constant")
    one = made(stepper_of(whole, schedule), state_of(whole), [a_batch()])
    four = made(stepper_of(cut, schedule), state_of(cut), parts_of(a_batch(), 8))
    assert float(one.loss) == pytest.approx(float(four.loss), abs=1e-6)
    for (name, left), right in zip(whole.named_parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(left.grad, right.grad, atol=1e-6, rtol=0, msg=name)
        torch.testing.assert_close(left, right, atol=1e-6, rtol=0, msg=name)


class Replayed(torch.autograd.Function):
    """A linear layer whose weight's gradient lies where that of the pass before lay, as a CUDA graph leaves it."""

    @staticmethod
    def forward(ctx, x, weight, memory):
        ctx.save_for_backward(x)
        ctx.memory = memory
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad):
        torch.mm(grad.T, *ctx.saved_tensors, out=ctx.memory)
        return None, ctx.memory.view_as(ctx.memory), None  # which autograd takes for its own


def test_gradients_of_a_compiled_network_outlive_the_next_micro_batch():
    """torch.compile(mode="reduce-overhead") overwrites them (pytorch/pytorch#169545, #96693)."""
    whole, cut = (nn.Linear(6, 3, bias=False) for _ in range(2))
    cut.load_state_dict(whole.state_dict())
    memory, stepper = torch.empty(3, 6), stepper_of(cut, Schedule(0.1, 10, kind="constant"))
    stepper.network = lambda x: Replayed.apply(x, cut.weight, memory)
    for size in (8, 32):
        made(stepper_of(whole, stepper.schedule), state_of(whole), [a_batch()])
        made(stepper, state_of(cut), parts_of(a_batch(), size))
        torch.testing.assert_close(cut.weight, whole.weight, atol=1e-6, rtol=0)


def test_clipping_scales_to_the_norm_and_reports_the_one_before():
    model = Net()
    before = [weight.detach().clone() for weight in model.parameters()]
    result = made(stepper_of(model, Schedule(1.0, 10, kind="constant"), clip=1e-3), state_of(model), [a_batch()])
    moved = torch.cat([(old - new).flatten() for old, new in zip(before, model.parameters(), strict=True)])
    assert float(result.grad_norm) > 1e-2
    assert float(moved.detach().norm()) == pytest.approx(1e-3, rel=1e-2)


def test_what_an_optimizer_draws_is_the_same_on_every_rank():
    """timm's Kron draws a probe for each update of its preconditioners."""
    class Drawing(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            for weight in self.param_groups[0]["params"]:
                weight += torch.randn_like(weight)

    models = [Net(), Net()]
    models[1].load_state_dict(models[0].state_dict())
    for rank, model in enumerate(models):
        state, stepper = state_of(model), stepper_of(model, Schedule(0.1, 10, kind="constant"))
        state.optimizer, stepper.ranks = Drawing(model.parameters(), lr=0.1), Ranks(rank, 1, torch.device("cpu"))
        made(stepper, state, [a_batch()])
    assert all(map(torch.equal, *(model.parameters() for model in models)))


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


def bad_batch(poison: float = float("nan")) -> Images:
    bad = a_batch()
    bad.images[5, 2] = poison
    return bad


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("made_before", [0, 1])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_skipped_update_leaves_every_bit(optimizer, made_before, poison):
    """Weights, BatchNorm's running statistics and its counter, moments, the average."""
    model = Net(nn.BatchNorm1d)
    state = state_of(model, ema=True)
    state.optimizer = OPTIMIZERS[optimizer](model.parameters())
    stepper = stepper_of(model, Schedule(0.1, 10, kind="constant"))
    for _ in range(made_before):
        assert not made(stepper, state, [a_batch()]).skipped
    before = bits(state)
    assert made(stepper, state, [bad_batch(poison)]).skipped
    assert state.step == made_before + 1  # the schedule counts it
    assert_same_bits(bits(state), before)
    assert not made(stepper, state, [a_batch()]).skipped
    assert state.step == made_before + 2
    assert all(torch.isfinite(value).all() for value in bits(state).values())


def test_an_update_given_up_between_micro_batches_leaves_every_bit():
    model = Net(nn.BatchNorm1d)
    state = state_of(model, ema=True)
    asked = AsksAfter(2)
    stepper = replace(stepper_of(model, Schedule(0.1, 10, kind="constant")), ranks=asked)
    made(replace(stepper, ranks=ALONE), state, [a_batch()])
    before = bits(state)
    assert stepper.update(state, parts_of(a_batch(), 8)) == (Status.GIVEN_UP, None)
    assert state.step == 1
    assert_same_bits(bits(state), before)
    assert all(weight.grad is None for weight in model.parameters())


class AsksAfter(Ranks):
    """Another rank asks to stop before this rank's micro-batch number `count`."""

    def __init__(self, count):
        super().__init__(0, 1, torch.device("cpu"))
        self.count, self.seen = count, []

    def any_asked_to_stop(self, asked):
        self.seen.append(asked)
        return len(self.seen) == self.count


def test_statistics_move_once_an_update_by_the_mean_of_the_micro_batches():
    """BatchNorm of four times eight images moves by a tenth of the way to the mean of the four batches' own."""
    model = Net(nn.BatchNorm1d)
    seen = []
    model.norm.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].detach()))
    state = state_of(model)
    made(stepper_of(model, Schedule(0.1, 10)), state, parts_of(a_batch(), 8))
    mean = torch.stack([one.mean(0) for one in seen]).mean(0)
    var = torch.stack([one.var(0) for one in seen]).mean(0)
    torch.testing.assert_close(model.norm.running_mean, 0.1 * mean)
    torch.testing.assert_close(model.norm.running_var, 0.9 + 0.1 * var)
    assert int(model.norm.num_batches_tracked) == 1


# Out of memory

class Hungry(Net):
    """Runs out of memory in the passes of these numbers, counted from 0."""

    def __init__(self, *passes: int, backward: bool = False, error: type[Exception] = torch.OutOfMemoryError,
                 words: str = "DefaultCPUAllocator: can't allocate memory"):
        super().__init__(nn.BatchNorm1d)
        self.passes, self.backward, self.error, self.words, self.count = passes, backward, error, words, 0

    def forward(self, x):
        number, self.count = self.count, self.count + 1
        y = super().forward(x)
        if number in self.passes and not self.backward:
            raise self.error(self.words)
        if number in self.passes:
            y.register_hook(self._raise)
        return y

    def _raise(self, gradient):
        raise self.error("CUDA out of memory")


@pytest.mark.parametrize("options", [{}, {"backward": True}, {"error": RuntimeError}, {
    "error": RuntimeError, "words": "could not create a primitive"}], ids=str)
@pytest.mark.parametrize(("passes", "size", "limit"), [((0,), 16, 8), ((1,), 16, 8), ((3, 7), 8, 2)], ids=str)
def test_out_of_memory_halves_the_micro_batches_and_leaves_no_trace(passes, size, limit, options):
    """The update is what a run with the smaller micro-batches from the start would have made, to the bit."""
    schedule = Schedule(0.1, 10, kind="constant")
    model, cut = Hungry(*passes, **options), Net(nn.BatchNorm1d)
    cut.load_state_dict(model.state_dict())
    state, expected = state_of(model, ema=True), state_of(cut, ema=True)
    stepper = replace(stepper_of(model, schedule), unit=2)
    update = made(stepper, state, parts_of(a_batch(), size))
    other = made(stepper_of(cut, schedule), expected, parts_of(a_batch(), limit))
    assert stepper.limit == limit
    assert float(update.loss).hex() == float(other.loss).hex()
    assert_same_bits(bits(state), bits(expected))


def test_what_cannot_be_halved_is_refused_with_what_helps():
    model = Hungry(*range(9))
    with pytest.raises(UserError, match="8 images at once do not fit"):
        replace(stepper_of(model, Schedule(0.1, 10)), unit=8).update(state_of(model), [a_batch()])


def test_moments_are_there_before_the_first_update():
    """AdamW's, with no step counted: the first update is that of an optimizer which allocates late."""
    early, late = Net(), Net()
    late.load_state_dict(early.state_dict())
    states = [state_of(model) for model in (early, late)]
    for state in states:
        state.optimizer = OPTIMIZERS["fused adamw"](state.model.parameters())
    allocate_moments(states[0].optimizer)
    assert all(float(moments["step"]) == 0 and not moments["exp_avg"].any()
               for moments in states[0].optimizer.state.values())
    for state in states:
        made(stepper_of(state.model, Schedule(0.1, 10)), state, [a_batch()])
    assert all(torch.equal(one, other) for one, other in zip(early.parameters(), late.parameters(), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("scaled", [False, True])
def test_the_host_never_waits_for_the_gpu_within_an_update(scaled):
    model = Net(nn.BatchNorm1d).cuda()
    state = state_of(model, ema=True)
    state.optimizer = OPTIMIZERS["fused adamw"](model.parameters())
    state.scaler = torch.amp.GradScaler("cuda", enabled=scaled)
    stepper = replace(stepper_of(model, Schedule(0.1, 10, kind="constant"), clip=1.0), ranks=GPU,
                      precision=Precision(torch.float16 if scaled else torch.bfloat16))
    batch = a_batch()
    batch = Images(batch.images.cuda(), batch.targets.cuda(), batch.indices)
    for _ in range(3):
        made(stepper, state, [batch])  # makes moments and the scale
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            made(stepper, state, [batch])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_an_overflow_of_the_gradient_scaler_is_no_step():
    """The scale halves, the weights stay (R11)."""
    model = Net()
    state = state_of(model)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    stepper = stepper_of(model, Schedule(0.1, 10, kind="constant"))
    weights = [weight.detach().clone() for weight in model.parameters()]
    bad = a_batch()
    bad.images *= 1e4
    assert made(stepper, state, [bad]).skipped
    assert state.scaler.get_scale() == 2.0**126
    assert all(torch.equal(old, new) for old, new in zip(weights, model.parameters(), strict=True))


def test_state_goes_through_a_checkpoint_bit_by_bit(tmp_path):
    model, other = Net(nn.BatchNorm1d), Net(nn.BatchNorm1d)
    state, again = state_of(model, ema=True), state_of(other, ema=True, lr=0.05)
    schedule = Schedule(0.1, 10, 2)
    for _ in range(3):
        made(stepper_of(model, schedule), state, [a_batch()])
    checkpoint.save(tmp_path / "c.pt", state.state_dict())
    again.load_state_dict(checkpoint.load(tmp_path / "c.pt"))
    for _ in range(3):
        left = made(stepper_of(model, schedule), state, [a_batch()])
        right = made(stepper_of(other, schedule), again, [a_batch()])
        assert float(left.loss).hex() == float(right.loss).hex()
    assert all(torch.equal(one, two) for one, two in zip(
        [*model.state_dict().values(), *state.ema.module.state_dict().values()],
        [*other.state_dict().values(), *again.ema.module.state_dict().values()], strict=True))


def test_the_first_module_that_went_wrong_is_named():
    model = Net(nn.BatchNorm1d)
    statistics = model.norm.running_mean.clone()
    batch = a_batch()

    def first() -> str | None:
        return examine(stepper_of(model, Schedule(0.1, 10)), state_of(model), [batch], 0).first

    assert first() is None
    with torch.no_grad():
        model.norm.weight[0] = float("inf")
    assert first() == "an input weight norm.weight (1 of 8 values)"
    with torch.no_grad():
        model.norm.weight[0] = 1
        model.second.weight.fill_(1e38)
    assert first().startswith("the output of second (")
    assert torch.equal(model.norm.running_mean, statistics)
    assert all(weight.grad is None for weight in model.parameters())


def test_an_examination_takes_no_more_images_at_once_than_fit():
    model, sizes = Net(), []
    model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    stepper = replace(stepper_of(model, Schedule(0.1, 10)), limit=8)
    assert examine(stepper, state_of(model), [a_batch()], 0).first is None
    assert sizes == [8] * 4


@pytest.mark.parametrize("size", [32, 8])
def test_an_examination_tells_the_loss_of_the_step(size):
    """Over all its micro-batches, and not as the scaler scales it; the ranges are those of the whole batch."""
    model = Net()
    state = state_of(model)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    stepper = stepper_of(model, Schedule(0.1, 10, kind="constant"))
    found = examine(stepper, state, parts_of(a_batch(), size), 0)
    hidden = model.first(a_batch().images)
    assert found.ranges["first"][:2] == pytest.approx([hidden.min().item(), hidden.max().item()], abs=1e-6)
    assert found.loss == pytest.approx(float(made(stepper, state, parts_of(a_batch(), size)).loss), abs=1e-6)


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
        batches = [Images(io["x_nchw"][i], io["y"][i].long(), torch.arange(4))
                   for i in range(update * parts, (update + 1) * parts)]
        result = made(stepper, state, batches)
        expected = io["micro_loss"][update * parts:(update + 1) * parts].mean()
        assert float(result.loss) == pytest.approx(float(expected), abs=1e-5)
        assert float(result.grad_norm) == pytest.approx(float(io["grad_norm_before_clip"][update]), abs=1e-5)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(float(io["lr"][update]), rel=1e-6, abs=1e-12)
    model.eval()
    torch.testing.assert_close(model(io["x_nchw"][0]), io["final_logits_microbatch0"], atol=1e-5, rtol=0)
    torch.testing.assert_close(model.head.weight, io["final_head_weight"], atol=1e-5, rtol=0)
