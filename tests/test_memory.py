"""How much memory a run takes: its part of a device, the end of it, and the sizes that cannot be; and how long."""

import multiprocessing
import re
import resource
import time
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from test_engine import ALONE
from test_engine_step import a_batch, made, state_of, stepper_of
from torch import nn

from deepvit.config.compose import compose
from deepvit.config.settings import Settings, read_settings
from deepvit.engine import device
from deepvit.engine.device import sharing
from deepvit.engine.schedule import Schedule
from deepvit.engine.signals import StopRequest
from deepvit.engine.step import Stepper
from deepvit.errors import UserError
from deepvit.run import build, measures, micro_batches

GIB = 2**30


class Wide(nn.Module):
    """Keeps more than 1 MiB an image for the backward pass."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 2**18), nn.Linear(6, 3)

    def forward(self, x):
        return self.last(x) * self.first(x).sigmoid().mean(1, keepdim=True)


def update_of(extra: int | None, answer) -> None:
    """An update of 64 images by a process that may take `extra` bytes more than it has: where it was cut, the loss."""
    torch.set_num_threads(1)  # others do not survive a fork
    model = Wide()
    state, stepper = state_of(model), stepper_of(model, Schedule(0.1, 10, kind="constant"))
    made(stepper, state, [a_batch(2)])
    if extra is not None:
        taken = device._field("/proc/self/status", "VmData")
        resource.setrlimit(resource.RLIMIT_DATA, (taken + extra, resource.RLIM_INFINITY))
    update = made(stepper, state, [a_batch(64)])
    answer.send((stepper.limit, float(update.loss)))


def apart(extra: int | None) -> tuple[int | None, float]:
    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=update_of, args=(extra, there))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    return here.recv()


def test_a_cpu_without_memory_halves_the_micro_batches():
    """Its allocator raises a plain RuntimeError; 64 images keep 64 MiB several times over."""
    (limit, loss), (unlimited, expected) = apart(96 * 2**20), apart(None)
    assert unlimited is None and limit in (8, 16, 32) and loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("sharing", "free", "wanted"), [(1, 12, 6), (2, 12, 6), (4, 12, 4), (4, 6, 3)])
def test_runs_that_share_a_host_take_their_parts(monkeypatch, sharing, free, wanted):
    """Half of what is free, and no more than half of their part of 32 GiB."""
    monkeypatch.setattr(device, "_host_memory", lambda: (free * GIB, 32 * GIB))
    assert device.available_bytes(torch.device("cpu"), sharing) == wanted * GIB


@pytest.mark.parametrize(("kind", "field"), [(resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")])
def test_what_ulimit_leaves_is_all_there_is(monkeypatch, kind, field):
    taken = device._field("/proc/self/status", field)
    limits = {kind: (taken + 2**30, resource.RLIM_INFINITY)}
    monkeypatch.setattr(resource, "getrlimit", lambda asked: limits.get(asked, (resource.RLIM_INFINITY,) * 2))
    free, total = device._host_memory()
    assert 0.9 * 2**30 < free <= 2**30 and total <= taken + 2**30


@pytest.mark.parametrize(("sharing", "wanted"), [(1, 62), (2, 26), (4, 8)])
def test_runs_that_share_a_gpu_take_their_parts(monkeypatch, sharing, wanted):
    """Of 80 GiB, 70 of them free, this process holds 10 and has 4 free in its cache: 90 % may be taken by all."""
    seen = {"mem_get_info": (66 * GIB, 80 * GIB), "memory_allocated": 10 * GIB, "memory_reserved": 14 * GIB}
    for name, value in seen.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert device.available_bytes(torch.device("cuda"), sharing) == wanted * GIB


@pytest.mark.parametrize(("sharing", "size"), [(1, 64), (2, 32), (8, 8), (1000, 4)])
def test_the_part_decides_how_many_images_go_at_once(monkeypatch, caplog, sharing, size):
    """An image of `Wide` keeps 1 MiB; where none fits, the smallest is taken, and a sentence says so."""
    monkeypatch.setattr(device, "_host_memory", lambda: (180 * 2**20, 180 * 2**20))
    model = Wide()
    stepper = stepper_of(model, Schedule(0.1, 10))
    example = lambda count: (torch.zeros(count, 6), torch.zeros(count, dtype=torch.int64))  # noqa: E731
    chosen, words = device.largest_batch([64, 32, 16, 8, 4], state_of(model), stepper, example, sharing)
    assert chosen == size and words.endswith("GiB") and ("may not fit" in caplog.text) == (size == 4)


def test_on_a_gpu_a_trial_pass_has_the_last_word(monkeypatch):
    """By the numbers 64 images fit; more than 16 do not. No trial leaves a trace, and the smallest needs none."""
    monkeypatch.setattr(device, "needed_bytes", lambda *_: (0, 1))
    monkeypatch.setattr(device, "available_bytes", lambda *_: GIB)
    model, tried = Wide(), []
    state = state_of(model)

    def loss(network, x, y):
        tried.append(len(x))
        if len(x) > 16:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return network(x).sum()

    stepper = SimpleNamespace(ranks=SimpleNamespace(device=torch.device("cuda")), loss=loss)
    example = lambda count: (torch.ones(count, 6), None)  # noqa: E731
    before = torch.get_rng_state()
    assert device.largest_batch([64, 32, 16, 8], state, stepper, example)[0] == 16 and tried == [64, 32, 16]
    assert all(weight.grad is None for weight in model.parameters()) and torch.equal(before, torch.get_rng_state())
    assert device.largest_batch([64, 32], state, stepper, example)[0] == 32 and tried[3:] == [64]


def test_on_a_gpu_the_first_pass_counts_for_nothing(monkeypatch):
    """It makes what stays: cuBLAS's workspace, here 100 bytes."""
    workspaces, model = iter([100]), Wide()
    monkeypatch.setattr(device, "_bytes_of", lambda *given: 7 + 5 * given[-1] + next(workspaces, 0))
    stepper = SimpleNamespace(ranks=SimpleNamespace(device=torch.device("cuda"), world=1))
    assert device.needed_bytes(state_of(model), stepper, None) == (7, 5)


@pytest.mark.parametrize(("value", "count"), [("1/4", 4), ("", 1), ("2/4", None), ("0.5", None), ("1/0", None)])
def test_the_environment_tells_the_part(monkeypatch, value, count):
    monkeypatch.setenv("DEEPVIT_SHARE", value)
    if count:
        assert sharing() == count
    else:
        with pytest.raises(UserError, match=f"DEEPVIT_SHARE={value}.*1/2"):
            sharing()


def settings_of(*overrides: str) -> Settings:
    return read_settings(compose(["model/attention=self", *overrides]))


MIXED = "augment.mixup=0.8", "augment.mix_prob=1"


@pytest.mark.parametrize(("norm_batch", "batch", "world", "mixed"), [
    (32, 100, 1, ()), (33, 100, 1, ()), (24, 96, 3, ()), (33, 132, 4, MIXED), (25, 100, 4, MIXED), (32, 64, 4, ()),
    (32, 20, 2, ()), (48, 64, 4, MIXED), (32, 63, 3, MIXED)], ids=str)
def test_statistics_over_what_no_device_has_are_refused_with_what_works(norm_batch, batch, world, mixed):
    """norm_batch does not divide, is odd where images are mixed in pairs, is more than a device's share."""
    with pytest.raises(UserError, match=f"data.batch_size={batch} .*norm_batch={norm_batch}") as refusal:
        micro_batches.allowed(settings_of(f"data.batch_size={batch}", *mixed), {norm_batch}, world)
    advice = str(refusal.value).rpartition("give a multiple of ")[2].rstrip(".")
    multiple, _, other = advice.partition(", or ")
    for factor in (1, 2, 3):
        given = settings_of(f"data.batch_size={factor * int(multiple)}", *mixed)
        assert micro_batches.allowed(given, {norm_batch}, world)
    if other:  # self-attention has no norm, so its file has no norm_batch for the norms of a stem
        given = settings_of(f"data.batch_size={batch}", *mixed, other)
        assert micro_batches.allowed(given, {given.model["attention"]["norm_batch"]}, world)
    assert bool(other) == (batch // world > 1 and not (mixed and batch // world % 2))


@pytest.mark.parametrize(("most", "wanted"), [(48, 32), (7, 8)])
def test_a_micro_batch_that_cannot_be_is_refused_with_what_can(most, wanted):
    """More than a device's share, or less than a group of images."""
    with pytest.raises(UserError, match=f"engine.device_batch={most} .*give {wanted} or .*auto"):
        micro_batches.allowed(settings_of("data.batch_size=64", f"engine.device_batch={most}"), {8}, 2)
    given = settings_of("data.batch_size=64", f"engine.device_batch={wanted}")
    assert micro_batches.allowed(given, {8}, 2)[0] == wanted


def test_statistics_of_whatever_comes_leave_no_choice():
    for batches in ({None}, {None, 8}):
        assert micro_batches.allowed(settings_of("data.batch_size=64"), batches, 2) == [32]


@pytest.mark.parametrize(("norm_batch", "count"), [(8, 8), ("null", 16)])
def test_what_does_not_fit_and_cannot_be_cut_is_refused_with_what_helps(monkeypatch, norm_batch, count):
    """A group of images; or, where statistics are those of a micro-batch, the whole of it."""
    settings = build.read_settings(compose([
        "model=deepvit16", "model.depth=3", f"model.attention.norm_batch={norm_batch}", "data.batch_size=32",
        "engine.device_batch=16", "precision=fp32", "model.drop_path_rate=0.1"]))
    built = build.build(settings, ALONE)
    built.state.model.set_grad_checkpointing(False)
    plain = Stepper.loss

    def loss(stepper, network, x, y):
        if len(x) > 4:
            raise torch.OutOfMemoryError
        return plain(stepper, network, x, y)

    monkeypatch.setattr(Stepper, "loss", loss)
    before = [weight.clone() for weight in built.model.parameters()]
    with pytest.raises(UserError) as refusal:
        built.stepper.update(built.state, next(built.make_batches(0, 1)))
    said = str(refusal.value)
    images, needs, there, less = map(float, re.fullmatch(
        r"(\d+) images .* need (\S+) GiB and (\S+) GiB are there; set engine.grad_checkpointing=true \((\S+) GiB\) or "
        r"precision=bf16 or a smaller model.attention.norm_batch.", said).groups())
    assert images == count and less < needs < 1 < there
    assert not built.model.grad_checkpointing and all(map(torch.equal, before, built.model.parameters()))


def test_a_forecast_tells_the_memory_of_its_own_run(monkeypatch):
    """And none that a larger one needed before in the same process: cells of a dry sweep."""
    monkeypatch.setattr(measures, "ENOUGH_S", 0.0)
    monkeypatch.setattr(measures, "MIN_STEPS", 1)

    def needed(*overrides: str) -> float:
        config = compose(["model=vit", "model.depth=1", "model.num_heads=4", "data.batch_size=16", *overrides])
        return measures.forecast(config, ALONE, StopRequest())["memory_mib"]

    wide, narrow = needed("model.embed_dim=1024"), needed("model.embed_dim=48")
    weights = 4 * 10 * 1024**2 / 2**20  # MiB: 10 D^2 of a block of width D in float32
    assert narrow < 60 < 4 * weights < wide < 16 * weights  # gradients and two moments; activations, workspace


@pytest.mark.parametrize(("batch", "most", "repeats", "wanted"), [
    (64, 64, 1, (1, 1)), (64, 16, 1, (4, 4)), (1024, 32, 1, (32, 4)), (96, 8, 3, (12, 6))])
def test_a_forecast_times_a_few_micro_batches(batch, most, repeats, wanted):
    """As many as hold whole sets of an image's copies."""
    settings = settings_of(f"data.batch_size={batch}", f"engine.device_batch={most}", f"augment.repeats={repeats}")
    built = SimpleNamespace(settings=settings, micro_batch=most, ranks=ALONE)
    assert measures._parts(built) == wanted


def test_a_forecast_counts_the_wait_for_eight_workers(monkeypatch):
    """They begin together, so their batches come together, and then none for a while."""
    make = build.batch_maker

    def in_bursts(settings, *given):
        made_at_once = make(replace(settings, data=replace(settings.data, workers=0)), *given)

        def batches(*places, **micro_batch):
            for number, batch in enumerate(made_at_once(*places, **micro_batch)):
                time.sleep(0.8 if number % 8 == 0 else 0.0)
                yield batch
        return batches

    monkeypatch.setattr(build, "batch_maker", in_bursts)
    monkeypatch.setattr(measures, "ENOUGH_S", 0.0)
    config = compose(["model=vit", "model.depth=1", "model.embed_dim=24", "model.num_heads=2", "data.workers=8"])
    assert measures.forecast(config, ALONE, StopRequest())["step_s"] > 0.1
