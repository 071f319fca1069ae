"""The sample stream and the batches: the same whatever the workers, ranks, accumulation and restarts."""

import os
import pickle
import random
import signal
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import deepvit.data as data
from deepvit.data.decode import BadImage
from deepvit.data.imageset import ArraySet
from deepvit.data.loader import Erasures
from deepvit.data.stream import Stream, draw, epoch_steps
from deepvit.errors import Failure, UserError


@pytest.fixture(scope="module")
def images() -> ArraySet:
    pixels = np.random.default_rng(0).integers(0, 256, (23, 12, 10, 3), dtype=np.uint8)
    return ArraySet(pixels, np.arange(23) % 5, "noise")


@pytest.fixture(scope="module")
def recipe() -> data.Transform:
    return data.train_transform(8, auto_augment="rand-m9-mstd0.5-inc1", random_erasing=0.5)


def same(one: data.Batch, other: data.Batch) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name))
               for name in ("images", "targets", "indices")) and \
        torch.equal(one.erasures.places, other.erasures.places) and \
        torch.equal(one.erasures.values, other.erasures.values)


def run(images, recipe, **options) -> list[list[data.Batch]]:
    return list(data.train_batches(images, recipe, **{"seed": 3, "batch_size": 8, "steps": 7, **options}))


def joined(parts: list[data.Batch]) -> data.Batch:
    """The micro-batches or ranks of one step as one batch."""
    offsets = np.cumsum([0] + [len(part) for part in parts])
    places = [part.erasures.places + torch.tensor([offset, 0, 0, 0, 0])
              for part, offset in zip(parts, offsets, strict=False)]
    tensors = {name: torch.cat([getattr(part, name) for part in parts])
               for name in ("images", "targets", "indices")}
    return data.Batch(**tensors, erasures=type(parts[0].erasures)(
        torch.cat(places), torch.cat([part.erasures.values for part in parts])))


@pytest.mark.parametrize("n,batch", [(23, 8), (8, 8), (5, 8), (1, 4), (24, 6)])
def test_epochs_are_permutations_end_to_end(n, batch):
    drawn = [draw(n, 1, step, np.arange(batch), batch) for step in range(3 * n)]
    indices = np.concatenate([one.indices for one in drawn])[:3 * n].reshape(-1, n)
    assert all(sorted(epoch) == list(range(n)) for epoch in indices.tolist())
    assert np.concatenate([one.epochs for one in drawn])[:3 * n].reshape(-1, n).tolist() == [[e] * n for e in range(3)]
    if n > 5:
        assert indices[0].tolist() != indices[1].tolist()
    assert epoch_steps(n, batch) == n / batch


def test_repeated_augmentation_shows_each_image_r_times_in_its_batch():
    for step in range(9):
        drawn = draw(20, 0, step, np.arange(12), 12, repeats=3)
        pairs = {*zip(drawn.indices.tolist(), drawn.repeats.tolist(), drawn.epochs.tolist(), strict=True)}
        assert len(pairs) == 12 and {repeat for _, repeat, _ in pairs} == {0, 1, 2}
        assert drawn.indices[:4].tolist() == drawn.indices[4:8].tolist() == drawn.indices[8:].tolist()
    assert epoch_steps(20, 12, 3) == 6 * 3 / 12


@pytest.mark.parametrize("repeats", [1, 2])
def test_ranks_and_accumulation_share_one_global_batch(images, recipe, repeats):
    whole = run(images, recipe, repeats=repeats)
    for world, accumulation in ((2, 1), (1, 4), (2, 2), (4, 1)):
        ranks = [run(images, recipe, repeats=repeats, rank=rank, world=world, accumulation=accumulation)
                 for rank in range(world)]
        for step in range(7):
            parts = [micro for rank in ranks for micro in rank[step]]
            assert len(parts) == world * accumulation
            assert same(joined(parts), whole[step][0])


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_and_restarts_change_nothing(images, recipe, workers):
    whole = run(images, recipe)
    cut = run(images, recipe, steps=3) + run(images, recipe, start_step=3, workers=workers)
    assert len(cut) == 7 and all(same(one[0], other[0]) for one, other in zip(cut, whole, strict=True))


def test_another_seed_epoch_or_repeat_is_another_image(images, recipe):
    assert not same(run(images, recipe)[0][0], run(images, recipe, seed=4)[0][0])
    one = images.take(np.arange(1))
    images = [step[0].images[row] for step in run(one, recipe, repeats=2) for row in range(8)]
    assert len({bytes(image.contiguous().numpy()) for image in images}) > 40  # 56 draws of one image


def test_the_training_process_keeps_its_random_numbers(images, recipe):
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    expected = torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    for workers in (0, 1):
        run(images, recipe, steps=2, workers=workers)
    list(data.eval_batches(images, data.eval_transform(8), batch_size=9))
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()) == expected


@pytest.mark.parametrize("n", [1, 2, 7, 23])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_evaluation_sees_every_image_once(images, n, world):
    part = images.take(np.arange(n))
    batches = [batch for rank in range(world)
               for batch in data.eval_batches(part, data.eval_transform(8), batch_size=3, rank=rank, world=world)]
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(n))
    assert torch.cat([batch.targets for batch in batches]).tolist() == part.targets.tolist()


def test_evaluation_with_workers(images):
    by_workers = [[*data.eval_batches(images, data.eval_transform(8), batch_size=5, workers=workers)]
                  for workers in (0, 2)]
    assert all(same(one, other) for one, other in zip(*by_workers, strict=True))


def test_everything_the_workers_get_can_be_pickled(images, recipe):
    """Spawned workers (macOS, Windows) get it that way."""
    for thing in (images, recipe, data.eval_transform(8), Stream(5, 0, 4, 2)):
        pickle.loads(pickle.dumps(thing))


@pytest.mark.parametrize("in_memory_mb,kept", [(512, True), (0, False)])
def test_a_small_set_is_prepared_for_all_evaluations_at_once(images, in_memory_mb, kept):
    options = {"batch_size": 5, "rank": 1, "world": 2, "workers": 0}
    batches = data.cached_eval_batches(images, data.eval_transform(8), in_memory_mb=in_memory_mb, **options)
    once = list(data.eval_batches(images, data.eval_transform(8), **options))
    first, second = list(batches()), list(batches())
    for made in (first, second):
        assert len(made) == len(once) and all(same(one, other) for one, other in zip(once, made, strict=True))
    assert (first[0] is second[0]) == kept
    elsewhere = data.cached_eval_batches(images, data.eval_transform(8), in_memory_mb=in_memory_mb, device="meta",
                                        **options)
    assert {batch.images.device.type for batch in elsewhere()} == {"meta" if kept else "cpu"}


def test_what_was_prepared_in_part_is_not_kept(images):
    """An image that cannot be used stops this evaluation and the next one alike."""
    class Bad(ArraySet):
        def image(self, index):
            if index == 7:
                raise BadImage("it is damaged")
            return super().image(index)

    batches = data.cached_eval_batches(Bad(images.pixels, images.targets, "bad"), data.eval_transform(8),
                                      batch_size=5, in_memory_mb=512)
    for _ in range(2):
        with pytest.raises(UserError, match="bad/7 is not a usable image"):
            list(batches())


class Deadly(ArraySet):
    """Kills the process that asks for its last image."""

    def image(self, index):
        if index == len(self) - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().image(index)


def test_a_killed_worker_is_a_failure_in_one_sentence(images):
    deadly = Deadly(images.pixels, images.targets, "deadly")
    with pytest.raises(Failure, match="A process that loads images died"):
        list(data.eval_batches(deadly, data.eval_transform(8), batch_size=5, workers=1))
    assert len(list(data.eval_batches(images, data.eval_transform(8), batch_size=5, workers=1))) == 5


def test_sent_ahead_they_are_the_same(images, recipe, device):
    plain = run(images, recipe, accumulation=2)
    sent = list(data.prefetch(iter(run(images, recipe, accumulation=2, pin=device.type == "cuda", workers=1)),
                           device))
    assert len(sent) == 7 and sent[0][0].images.device == device
    assert all(same(one.to(torch.device("cpu")), other) for left, right in zip(sent, plain, strict=True)
               for one, other in zip(left, right, strict=True))


@pytest.mark.parametrize(("device", "waits"), [("cpu", True), ("cuda:1", False)])
def test_only_a_copy_to_the_host_waits(device, waits):
    images, targets, values = (Mock(spec=torch.Tensor) for _ in range(3))
    data.Batch(images, targets, None, Erasures(None, values)).to(device)
    assert [one.to.call_args.kwargs["non_blocking"] for one in (images, targets, values)] == [not waits] * 3
