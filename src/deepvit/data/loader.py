"""Batches for training and evaluation: one DataLoader per run, whose item is a whole micro-batch."""

import math
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from deepvit.data.decode import BadImage
from deepvit.data.imageset import ImageSet
from deepvit.data.randomness import generators_kept, seed_sample
from deepvit.data.stream import Draw, Stream
from deepvit.data.transforms import Patch, Transform
from deepvit.errors import Failure, UserError

LONGEST_SEARCH = 100  # bad images in a row before giving up on finding a replacement


@dataclass(frozen=True)
class Bad:
    """An image that could not be used. `replaced_by` is the index shown instead; None: black, to be counted wrong."""

    index: int
    name: str
    reason: str
    replaced_by: int | None


@dataclass
class Erasures:
    """Rectangles to write into a normalised batch."""

    places: Tensor  # int64 [k, 5]: row of the batch, top, left, height, width
    values: Tensor  # float32 [sum of 3 * height * width], one after the other

    def of_rows(self, start: int, stop: int) -> "Erasures":
        """Those of rows `start` to `stop`, counted from `start`. Rows are in order."""
        first, end = torch.searchsorted(self.places[:, 0].contiguous(), torch.tensor([start, stop])).tolist()
        sizes = 3 * self.places[:, 3] * self.places[:, 4]  # [k]
        begin, count = int(sizes[:first].sum()), int(sizes[first:end].sum())
        return Erasures(self.places[first:end] - torch.tensor([start, 0, 0, 0, 0]), self.values[begin:begin + count])

    def write(self, x: Tensor) -> Tensor:
        """Into normalised images [b, 3, S, S]."""
        values, start = self.values.to(x.device, non_blocking=True), 0
        for row, top, left, height, width in self.places.tolist():
            end = start + 3 * height * width
            x[row, :, top:top + height, left:left + width] = values[start:end].view(3, height, width)
            start = end
        return x


@dataclass
class Batch:
    """One micro-batch as the workers make it."""

    images: Tensor  # uint8 [b, 3, S, S], channels last in memory
    targets: Tensor  # int64 [b]
    indices: Tensor  # int64 [b], of the images asked for
    positions: Tensor  # int64 [b], place in the global batch (training) or in the set (evaluation)
    erasures: Erasures
    bad: list[Bad] = field(default_factory=list)
    refused: int = 0  # images that the fast decoder refused and PIL read

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device) -> "Batch":
        """A copy with what the model needs on the device; the places of the erasures stay, Python reads them."""
        queued = {"device": device, "non_blocking": torch.device(device).type != "cpu"}  # to the host one must wait
        return replace(self, images=self.images.to(**queued), targets=self.targets.to(**queued),
                       erasures=replace(self.erasures, values=self.erasures.values.to(**queued)))

    def split(self, size: int) -> "list[Batch]":
        """Parts of at most `size` images, as views; what is said of bad images stays with the first."""
        parts = []
        for start in range(0, len(self), size):
            rows = slice(start, start + size)
            part = replace(self, images=self.images[rows], targets=self.targets[rows], indices=self.indices[rows],
                           positions=self.positions[rows], erasures=self.erasures.of_rows(start, start + size))
            parts.append(part if not parts else replace(part, bad=[], refused=0))
        return parts

    def pin_memory(self) -> "Batch":
        """Called by the DataLoader's pinning thread."""
        for part in (self, self.erasures):
            vars(part).update({name: value.pin_memory() for name, value in vars(part).items()
                               if isinstance(value, Tensor)})
        return self


class _Batches(Dataset):
    """Draw -> Batch, or the UserError that this led to (raised in a worker it would come back as a traceback)."""

    def __init__(self, images: ImageSet, transform: Transform, seed: int, on_error: str):
        self.images, self.transform, self.seed, self.on_error = images, transform, seed, on_error

    def __getitem__(self, draw: Draw) -> Batch | UserError:
        try:
            with generators_kept() if self.transform.random else nullcontext():
                return self._batch(draw)
        except UserError as error:
            return error

    def _batch(self, draw: Draw) -> Batch:
        refused, bad, patches = self.images.refused, [], []
        pixels = torch.empty(len(draw.indices), *self.transform.size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        targets = torch.empty(len(draw.indices), dtype=torch.int64)
        samples = np.stack([draw.epochs, draw.indices, draw.repeats], axis=1).tolist()
        for row, sample in enumerate(samples):
            (pixels[row], erased), used = self._sample(sample[1], (self.seed, *sample), bad)
            targets[row] = int(self.images.targets[used])
            patches += [(row, *patch) for patch in erased]
        return Batch(pixels, targets, torch.from_numpy(draw.indices), torch.from_numpy(draw.positions),
                     _pack(patches), bad, self.images.refused - refused)

    def _sample(self, index: int, seeds: tuple[int, ...], bad: list[Bad]):
        """(what the transform makes, index used).

        A bad one: the next that is good (training), black (report), or a UserError (stop).
        """
        used, first = index, ""
        for _ in range(LONGEST_SEARCH):
            try:
                image = self.images.image(used)
                if self.transform.random:
                    seed_sample(*seeds)
                made = self.transform(image)
            except BadImage as reason:
                first = first or str(reason)
                if self.on_error == "stop":
                    raise UserError(f"{self.images.name(used)} is not a usable image: {reason}. Mend or remove it, "
                                    "or give data.on_error=report to count such images as wrong.") from reason
                if self.on_error == "report":
                    bad.append(Bad(index, self.images.name(index), first, None))
                    return (0, []), index
                used = (used + 1) % len(self.images)
                continue
            if used != index:
                bad.append(Bad(index, self.images.name(index), first, used))
            return made, used
        raise UserError(f"{LONGEST_SEARCH} images in a row cannot be used, from {self.images.name(index)} on: "
                        f"{first}.")


def _pack(patches: Sequence[tuple[int, *Patch]]) -> Erasures:
    places = [(row, top, left, *values.shape[1:]) for row, top, left, values in patches]
    return Erasures(torch.tensor(places, dtype=torch.int64).reshape(-1, 5),
                    torch.cat([torch.empty(0), *(values.flatten() for *_, values in patches)]))


def _outlive_a_request_to_stop(worker: int) -> None:
    """A signal to a whole process group (a job scheduler's, Ctrl-C) is for the training process, which then ends us."""
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))  # the second one ends


def _run(dataset: _Batches, draws: Stream | Sequence[Draw], workers: int, pin: bool) -> Iterator[Batch]:
    dataset.images.prepare()
    with warnings.catch_warnings():  # of more processes than cores: said once, at the start of a run
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        batches = iter(DataLoader(dataset, batch_size=None, sampler=draws, num_workers=workers, pin_memory=pin,
                                  worker_init_fn=_outlive_a_request_to_stop,
                                  generator=torch.Generator()))  # own generator: iter() would draw from torch's
    try:
        for batch in batches:
            if isinstance(batch, UserError):
                raise batch
            yield batch
    except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:  # the last three: cut in a transfer
        if not workers or isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        raise Failure(f"A process that loads images died ({str(error) or type(error).__name__}); with too little "
                      "memory or shared memory (/dev/shm), lower data.workers.") from error
    finally:
        if workers:
            _end_workers(batches)


def _end_workers(batches: Iterator[Batch]) -> None:
    """At once: a traceback may keep the iterator alive, and torch would raise for a dead worker at any later time."""
    try:
        batches._shutdown_workers()
    except RuntimeError as error:  # torch's signal handler, about a worker that died; the shutdown itself is complete
        if "DataLoader worker" not in str(error):
            raise


def train_batches(images: ImageSet, transform: Transform, *, workers: int = 0, max_bad: int = 100, pin: bool = False,
                  **places: int) -> Iterator[list[Batch]]:
    """One list of `accumulation` micro-batches for each optimizer step in [start_step, steps).

    Args:
        max_bad: distinct bad images (replaced by the next good one) that this rank accepts.
        pin: batches in page-locked memory, for a GPU.
        places: the other fields of `Stream`.
    Raises:
        UserError for sizes that do not divide and for too many bad images; Failure if a worker dies.
    """
    stream = Stream(len(images), **places)
    batches = _run(_Batches(images, transform, stream.seed, "replace"), stream, workers, pin)
    return grouped(batches, stream.accumulation, max_bad)


def grouped(batches: Iterator[Batch], accumulation: int, max_bad: int) -> Iterator[list[Batch]]:
    """Lists of `accumulation` batches each. Raises UserError for more than `max_bad` distinct bad images."""
    seen, step = set(), []
    for batch in batches:
        seen.update(bad.index for bad in batch.bad)
        if len(seen) > max_bad:
            last = batch.bad[-1]
            raise UserError(f"{len(seen)} images cannot be used, more than data.max_bad={max_bad}; the last is "
                            f"{last.name}: {last.reason}.")
        step.append(batch)
        if len(step) == accumulation:
            yield step
            step = []


def eval_batches(images: ImageSet, preprocess: Transform, *, batch_size: int, rank: int = 0, world: int = 1,
                 workers: int = 0, on_error: str = "stop", pin: bool = False) -> Iterator[Batch]:
    """Every image exactly once over all ranks: rank r has [r n / world, (r + 1) n / world), the last batch is short.

    Ranks may have different numbers of batches (also none), so nothing collective may happen per batch. A bad image
    raises UserError with its name (`stop`), or comes as a black image listed in `Batch.bad` (`report`).
    """
    share = np.arange(len(images) * rank // world, len(images) * (rank + 1) // world)
    parts = [share[start:start + batch_size] for start in range(0, len(share), batch_size)]
    draws = [Draw(np.zeros_like(part), part, np.zeros_like(part), part) for part in parts]
    return _run(_Batches(images, preprocess, 0, on_error), draws, min(workers, len(draws)), pin)


def eval_batches_again(images: ImageSet, preprocess: Transform, *, in_memory_mb: int,
                       device: torch.device | str = "cpu", world: int = 1, workers: int = 0, **options: object
                       ) -> Callable[[], Iterator[Batch]]:
    """`eval_batches` for one evaluation after another; each call of what is returned gives all of them.

    They are made but once, in this process, and stay on `device`, where the set is in memory and a rank's share of
    what becomes of it fits in in_memory_mb too.
    """
    kept: list[Batch] = []

    def batches() -> Iterator[Batch]:
        images.prepare()
        share = 3 * math.prod(preprocess.size) * len(images) / world  # bytes
        if not images.in_memory or share > in_memory_mb * 2**20:
            yield from eval_batches(images, preprocess, world=world, workers=workers, **options)
            return
        if not kept:
            kept[:] = [batch.to(device) for batch in eval_batches(images, preprocess, world=world, **options)]
        yield from kept

    return batches
