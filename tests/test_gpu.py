"""What users do, on a GPU as on the CPU: each body runs here on the CPU, and with `-m gpu` where there is one."""

import copy
from contextlib import contextmanager, nullcontext

import faults
import pytest
import soak
import torch
import torch.distributed as dist
from torch.nn.utils import parameters_to_vector
from torch.utils._python_dispatch import TorchDispatchMode

from deepvit import ops
from deepvit.config.compose import compose
from deepvit.engine.device import prepare_device
from deepvit.engine.evaluate import Evaluation, evaluate
from deepvit.engine.ranks import Ranks
from deepvit.engine.step import Status
from deepvit.ops import HeadNorm, core, reference
from deepvit.run import build
from deepvit.run.build import Built

# No dropout: a GPU draws other random numbers than a CPU. All else that a run can have.
SMALL = ["model=vit", "model/attention=reattention", "model.attention.norm_batch=8", "model.depth=2",
         "model.embed_dim=64", "model.num_heads=4", "model.drop_path_rate=0.1", "data.batch_size=32",
         "engine.device_batch=16", "augment.mixup=0.8", "augment.mix_prob=1.0", "augment.random_erasing=0.25",
         "ema.decay=0.9", "optimizer.clip_grad=1.0", "schedule.warmup_epochs=0", "optimizer.lr=1e-3"]
STEPS = 20
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def tf32_as_it_was():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def build_on(device: torch.device, *overrides: str, precision: str = "fp32") -> Built:
    settings = build.read_settings(compose([*SMALL, f"precision={precision}", *overrides]))
    ranks = Ranks(0, 1, device)
    prepare_device(build.precision(settings.precision, device), ranks)
    built = build.build(settings, ranks)
    if settings.precision.scale_gradients:  # torch's 2^16 overflows in the first step, which is then skipped
        built.state.scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)
    return built


def train(built: Built, steps: int = STEPS) -> torch.Tensor:
    """The losses of so many updates, `[steps]`."""
    updates = [built.stepper.update(built.state, batch) for batch in built.make_batches(built.state.step, steps)]
    assert {status for status, _ in updates} == {Status.DONE} and not any(update.skipped for _, update in updates)
    return torch.stack([update.loss for _, update in updates]).cpu()


def average_of(built: Built) -> torch.Tensor:
    return parameters_to_vector(built.state.ema.module.parameters()).detach()


def relative(got: torch.Tensor, exact: torch.Tensor) -> float:
    exact = exact.double().cpu()
    return float((got.double().cpu() - exact).norm() / exact.norm())


def furthest(losses: torch.Tensor, others: torch.Tensor) -> float:
    return float(((losses - others).abs() / others).max())


@pytest.fixture(scope="module")
def on_the_cpu() -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and averaged weights after them, in float32."""
    built = build_on(CPU)
    return train(built), average_of(built)


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-3), ("tf32", 1e-2), ("bf16", 4e-2), ("fp16", 1e-2)])
def test_twenty_steps_are_those_of_the_cpu(device, on_the_cpu, precision, bound):
    """Within rounding: losses, and the average of the weights. (Of the keys' bias, whose gradient is nothing but
    rounding, Adam makes whole steps: 0.3 % of the weights.)"""
    built = build_on(device, precision=precision)
    losses = train(built)
    assert losses[-5:].mean() < losses[:5].mean() - 0.05
    assert furthest(losses, on_the_cpu[0]) < bound and relative(average_of(built), on_the_cpu[1]) < 1e-2


def evaluation(built: Built, model: torch.nn.Module, ranks: Ranks) -> Evaluation:
    data, images = built.settings.data, built.splits.val
    return evaluate(model, build.eval_batches(data, images, ranks)(), build.prepare(data, 10), ranks,
                    build.precision(built.settings.precision, ranks.device), n=len(images))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_folded_evaluation_is_the_definition(device, precision):
    """With the statistics of a run: against the same weights in float64, whose maps are made and kept."""
    built = build_on(device, precision=precision)
    train(built, 10)
    model = built.state.evaluated_model.eval()
    exact = copy.deepcopy(model).cpu().double()
    for block in exact.blocks:
        block.attn.attend = lambda q, k, v, attention=block.attn: attention.maps(q, k) @ v
    x = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), build.precision(built.settings.precision, device).autocast(device):
        assert relative(model(x.to(device)), exact(x.double())) < (1e-4 if precision == "fp32" else 2e-2)
    here, there = (evaluation(built, one, ranks) for one, ranks in (
        (model, built.ranks), (copy.deepcopy(model).cpu(), Ranks(0, 1, CPU))))
    assert here.loss == pytest.approx(there.loss, rel=1e-2) and abs(here.correct1 - there.correct1) <= 4


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow),
                                    pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_with_and_without_checkpointing(device, on_the_cpu, checkpointing):
    built = build_on(device, "engine.compile=true", f"engine.grad_checkpointing={checkpointing}")
    assert furthest(train(built), on_the_cpu[0]) < 1e-3 and relative(average_of(built), on_the_cpu[1]) < 1e-2


@pytest.mark.parametrize("mixing", ["augment.mixup=0.8", "augment.cutmix=1.0"])
def test_channels_stay_last_to_the_end_of_the_stem(device, mixing):
    built, layouts = build_on(device, "model.stem=conv", "augment.mixup=0", mixing), []
    for part in built.model.patch_embed.children():
        part.register_forward_pre_hook(
            lambda module, inputs: layouts.append(inputs[0].is_contiguous(memory_format=torch.channels_last)))
    train(built, 1)
    assert layouts == [True] * 5 * 2  # parts, micro-batches


def test_checkpointing_changes_nothing_but_rounding(device, on_the_cpu):
    assert furthest(train(build_on(device, "engine.grad_checkpointing=true")), on_the_cpu[0]) < 1e-3


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 1.5e-2)],
                         ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("tokens", "width"), [(50, 32), (197, 32), (577, 32), (197, 16), (197, 33), (50, 64)])
def test_sizes_that_published_models_have(device, tokens, width, dtype, bound):
    """Output, every gradient and the running statistics against the definition in float64, on the same inputs."""
    rng = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=rng)  # noqa: E731
    heads = 12
    packed, seed = (draw(1, tokens, parts, heads, width).to(device, dtype) for parts in (3, 1))
    head = [0.3 * draw(heads, heads), 1 + 0.1 * draw(heads), 0.1 * draw(heads)]  # mix, gamma, beta
    results = []
    for op, wide in ((reference.reattention, torch.float64), (ops.reattention, torch.float32)):
        qkv = (packed.double() if op is reference.reattention else packed).clone().requires_grad_()
        leaves = [x.to(device, wide).requires_grad_() for x in head]
        stats = torch.zeros(heads, device=device, dtype=wide), torch.ones(heads, device=device, dtype=wide)
        out = op(*qkv.permute(2, 0, 3, 1, 4).unbind(0), leaves[0], norm=HeadNorm(*leaves[1:], *stats), training=True)
        grads = torch.autograd.grad(out, (qkv, *leaves), seed[:, :, 0].transpose(1, 2).to(out.dtype))
        results.append([out.detach(), *grads, *stats])
    for name, exact, got in zip("out dqkv dmix dgamma dbeta mean var".split(), *results, strict=True):
        assert relative(got, exact) < bound, name


class NothingRead(TorchDispatchMode):
    """The host must not read a value that is computed: it would wait for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@contextmanager
def no_waiting(device: torch.device):
    """On a CPU, where nothing is waited for, what would be on a GPU."""
    if device.type == "cpu":
        with NothingRead():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_host_waits_for_nothing_in_a_steady_step(device, precision, monkeypatch):
    """The whole of it, from the loader's batch to the average."""
    monkeypatch.setattr(core, "choose", lambda *_, **__: ("as on a GPU", ""))  # not the CPU's eager form, which reads
    built = build_on(device, precision=precision)
    updates, batches = [], built.make_batches(0, 8)
    for number in range(8):
        with no_waiting(device) if number >= 4 else nullcontext():  # the first ones make what stays
            updates.append(built.stepper.update(built.state, next(batches)))
    assert {status for status, _ in updates} == {Status.DONE} and not any(update.skipped for _, update in updates)


@pytest.fixture
def twin(device, tmp_path, monkeypatch) -> Ranks:
    """One of two ranks, of which the other has the same to say; what they exchange goes through NCCL on a GPU."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", init_method=f"file://{tmp_path}/meet", rank=0,
                            world_size=1)
    control, alone = dist.new_group(backend="gloo"), dist.all_reduce

    def all_reduce(values, *arguments, group=None):
        alone(values, *arguments, group=group)
        if group is None:
            values *= 2

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    yield Ranks(0, 2, device, control)
    dist.destroy_process_group()


def test_an_exchange_with_a_twin_changes_nothing(device, twin, on_the_cpu):
    built = build_on(device)
    built.stepper.ranks = twin
    assert furthest(train(built), on_the_cpu[0]) < 1e-3


def test_a_rank_of_torchruns_trains_as_one_alone_and_a_killed_run_continues(device, tmp_path):
    """The same bits, in float16, whose scaler has a state too."""
    config = soak.compose(f"engine.accelerator={device.type}", "precision=fp16", "schedule.steps=12", "probe.images=0",
                          "schedule.eval_steps=6", "engine.deterministic=true")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run, = faults.start_ranks(1, faults.train, config, whole)
    assert run.wait(120) == 0, run.words()
    killed = soak.train(config, cut)
    killed.wait_until(lambda: soak.step_reached(cut) >= 5)
    killed.send()
    assert killed.wait() == -9, killed.words()
    again = soak.train(config, cut)
    assert again.wait(120) == 0, again.words()
    assert soak.events(cut, "resume")[0]["step"] in range(3, 12) and f"1 x {device.type}" in again.words()
    assert soak.losses(cut) == pytest.approx(soak.losses(whole), rel=1e-2)  # first: it says how far they are apart
    assert soak.differences(whole, cut) == 0
