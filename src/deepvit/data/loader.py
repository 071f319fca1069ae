"""Batches for training and evaluation: one DataLoader per run, whose item is a whole micro-batch."""

import math
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from deepvit.data.decode import BadImage
from deepvit.data.imageset import ImageSet
from deepvit.data.stream import Draw, Stream, generators_kept, seed_sample
from deepvit.data.transforms import Transform
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

    places: Tensor  # int64 [k, 5]: row of the batch, in order; top, left, height, width
    values: Tensor  # float32 [sum of 3 * height * width], one after the other

    def of_rows(self, start: int, stop: int) -> "Erasures":
        """Those of rows `start` to `stop`, counted from `start`."""
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
    erasures: Erasures
    bad: list[Bad] = field(default_factory=list)
    pil_fallbacks: int = 0  # images that the fast decoder refused and PIL read

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def usable(self) -> Tensor:
        """bool [b]: whether the image could be read, and is none of the black ones of on_error=report."""
        return ~torch.isin(self.indices, torch.tensor([one.index for one in self.bad], dtype=torch.int64))

    def to(self, device: torch.device) -> "Batch":
        """A copy with what the model needs on the device; the places of the erasures stay, Python reads them."""
        queued = torch.device(device).type != "cpu"  # copies to the host must be waited for
        return self._moved(lambda tensor: tensor.to(device=device, non_blocking=queued))

    def pin_memory(self) -> "Batch":
        """Called by the DataLoader's pinning thread."""
        return self._moved(Tensor.pin_memory)

    def _moved(self, move: Callable[[Tensor], Tensor]) -> "Batch":
        return replace(self, images=move(self.images), targets=move(self.targets),
                       erasures=replace(self.erasures, values=move(self.erasures.values)))

    def split(self, size: int) -> "list[Batch]":
        """Parts of at most `size` images, as views; the report of bad images stays with the first."""
        tensors = zip(self.images.split(size), self.targets.split(size), self.indices.split(size), strict=True)
        parts = [Batch(*part, self.erasures.of_rows(i * size, (i + 1) * size)) for i, part in enumerate(tensors)]
        parts[0].bad, parts[0].pil_fallbacks = self.bad, self.pil_fallbacks
        return parts


class _Batches(Dataset):
    """Draw -> Batch, or the UserError that it raised (which would leave a worker as a traceback)."""

    def __init__(self, images: ImageSet, transform: Transform, seed: int, on_error: str):
        self.images, self.transform, self.seed, self.on_error = images, transform, seed, on_error

    def __getitem__(self, draw: Draw) -> Batch | UserError:
        try:
            return self._batch(draw)
        except UserError as error:
            return error

    @generators_kept()
    def _batch(self, draw: Draw) -> Batch:
        before, bad, places, values = self.images.pil_fallbacks, [], [], [torch.empty(0)]
        pixels = torch.empty(len(draw.indices), *self.transform.size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        targets = torch.empty(len(draw.indices), dtype=torch.int64)
        for row, sample in enumerate(np.stack([draw.epochs, draw.indices, draw.repeats], axis=1).tolist()):
            (pixels[row], erased), used = self._sample(sample[1], (self.seed, *sample), bad)
            targets[row] = int(self.images.targets[used])
            places += [(row, top, left, *patch.shape[1:]) for top, left, patch in erased]
            values += [patch.flatten() for *_, patch in erased]
        erasures = Erasures(torch.tensor(places, dtype=torch.int64).reshape(-1, 5), torch.cat(values))
        return Batch(pixels, targets, torch.from_numpy(draw.indices), erasures, bad, self.images.pil_fallbacks - before)

    def _sample(self, index: int, seeds: tuple[int, ...], bad: list[Bad]):
        """(what the transform makes, index used); in place of a bad image the next good one, black, or a UserError."""
        reasons = []
        for step in range(LONGEST_SEARCH if self.on_error == "replace" else 1):
            used = (index + step) % len(self.images)
            try:
                image = self.images.image(used)
                seed_sample(*seeds)
                made = self.transform(image)
            except BadImage as reason:
                reasons.append(str(reason))
                continue
            if reasons:
                bad.append(Bad(index, self.images.name(index), reasons[0], used))
            return made, used
        name = self.images.name(index)
        if self.on_error == "report":
            bad.append(Bad(index, name, reasons[0], None))
            return (0, []), index
        if self.on_error == "stop":
            raise UserError(f"{name} is not a usable image: {reasons[0]}. Fix it, or give data.on_error=report.")
        raise UserError(f"{LONGEST_SEARCH} images in a row cannot be used, from {name} on: {reasons[0]}.")


def _ignore_stop_signals(worker: int) -> None:
    """A signal to a whole process group (a job scheduler's, Ctrl-C) is for the training process, which then ends us."""
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))  # the second one ends


def _run(dataset: _Batches, draws: Stream | Sequence[Draw], workers: int, pin: bool) -> Iterator[Batch]:
    dataset.images.cache_decoded()
    with warnings.catch_warnings():  # of more processes than cores: reported once, at the start of a run
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        batches = iter(DataLoader(dataset, batch_size=None, sampler=draws, num_workers=workers, pin_memory=pin,
                                  worker_init_fn=_ignore_stop_signals,
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
        if workers:  # end now: a traceback may keep the iterator alive, and torch raises for dead workers at any time
            try:
                batches._shutdown_workers()
            except RuntimeError as error:  # of torch's signal handler, about a worker that died: all are ended by then
                if "DataLoader worker" not in str(error):
                    raise


def train_batches(images: ImageSet, transform: Transform, *, workers: int = 0, max_bad: int = 100, pin: bool = False,
                  **places: int) -> Iterator[list[Batch]]:
    """One list of `accumulation` micro-batches, `pin`ned for a GPU, for each step in [start_step, steps). `places`: the
    other fields of `Stream`. UserError for more than `max_bad` distinct bad images here, Failure if a worker dies."""
    stream = Stream(len(images), **places)
    batches = _run(_Batches(images, transform, stream.seed, "replace"), stream, workers, pin)
    return grouped(batches, stream.accumulation, max_bad)


def grouped(batches: Iterator[Batch], accumulation: int, max_bad: int) -> Iterator[list[Batch]]:
    """Lists of `accumulation` batches each. Raises UserError for more than `max_bad` distinct bad images."""
    seen, step = set(), []
    for batch in batches:
        seen.update(bad.index for bad in batch.bad)
        if len(seen) > max_bad:
            last = f"{batch.bad[-1].name}: {batch.bad[-1].reason}"
            raise UserError(f"{len(seen)} images cannot be used, more than data.max_bad={max_bad}; the last is {last}.")
        step.append(batch)
        if len(step) == accumulation:
            yield step
            step = []


def prefetch(steps: Iterator[list[Batch]], device: torch.device | str) -> Iterator[list[Batch]]:
    """The same steps with their tensors on `device`: a GPU's are copied, from pinned memory, during the step before."""
    device = torch.device(device)
    if device.type != "cuda":
        yield from steps
        return
    side, waiting = torch.cuda.Stream(device), None
    for step in steps:
        with torch.cuda.stream(side):
            sent = [batch.to(device) for batch in step]
        if waiting is not None:
            yield waiting
        computing = torch.cuda.current_stream(device)
        computing.wait_stream(side)
        for batch in sent:
            for tensor in (batch.images, batch.targets, batch.erasures.values):
                tensor.record_stream(computing)  # tells the allocator, since the side stream allocated it
        waiting = sent
    if waiting is not None:
        yield waiting


def eval_batches(images: ImageSet, preprocess: Transform, *, batch_size: int, rank: int = 0, world: int = 1,
                 workers: int = 0, on_error: str = "stop", pin: bool = False) -> Iterator[Batch]:
    """Every image exactly once over all ranks: rank r has [r n / world, (r + 1) n / world), the last batch is short.
    Ranks may have different numbers of batches (also none), so nothing collective may happen per batch. A bad image
    raises UserError with its name (`stop`), or comes as a black image listed in `Batch.bad` (`report`)."""
    share = np.arange(len(images) * rank // world, len(images) * (rank + 1) // world)
    parts = [share[start:start + batch_size] for start in range(0, len(share), batch_size)]
    draws = [Draw(np.zeros_like(part), part, np.zeros_like(part)) for part in parts]
    return _run(_Batches(images, preprocess, 0, on_error), draws, min(workers, len(draws)), pin)


def cached_eval_batches(images: ImageSet, preprocess: Transform, *, in_memory_mb: int,
                        device: torch.device | str = "cpu", world: int = 1, workers: int = 0, **options: object
                        ) -> Callable[[], Iterator[Batch]]:
    """Each call of what is returned gives all `eval_batches`. Of a set in memory they are made once, in this process,
    and stay on `device`, if a rank's share of them fits in `in_memory_mb` too."""
    kept: list[Batch] = []

    def batches() -> Iterator[Batch]:
        share = 3 * math.prod(preprocess.size) * len(images) / world  # bytes
        if not images.cache_decoded() or share > in_memory_mb * 2**20:
            yield from eval_batches(images, preprocess, world=world, workers=workers, **options)
            return
        if not kept:
            kept[:] = [batch.to(device) for batch in eval_batches(images, preprocess, world=world, **options)]
        yield from kept

    return batches
