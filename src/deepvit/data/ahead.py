"""The next step's images travel to the GPU while this step computes."""

from collections.abc import Iterator

import torch

from deepvit.data.loader import Batch


def ahead(steps: Iterator[list[Batch]], device: torch.device | str) -> Iterator[list[Batch]]:
    """The same steps with their tensors on `device`, copied on a side stream one step early; from a CPU's view nothing.

    The batches should be pinned (`pin=True`), or the copies wait.
    """
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
