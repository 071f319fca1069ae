"""The registered measures: `probe`, the runs' logs, the figures and the docs read them here, so a new measure is a new
function in one of the modules that the package imports."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Measure:
    """One number for each block. `name` is its key in probes and logs; a slash nests it. `takes` names what the
    function is given, in its order:

    - of an attention: `module`, `logits`, `softmax`, `final` (maps `[B, H, N, N]`), `grid` (rows and columns of
      patches), `cls_token`; the maps as unit columns, `unit/<kind>`, and those of the previous attention,
      `previous/<kind>`, see `probe.KINDS`;
    - of a block: `first`, `before`, `after` (tokens `[B, N, D]` that enter the first block, this one, and leave it),
      `attention`, `mlp` (RMS `[B]` of the branches as they are added);
    - of both, once for all images: `norm`, `theta`; `rows_first`, `rows_before`, `rows_after` (a sample `[n, D]` of
      those tokens).

    It returns a number, a tensor whose mean is the number (with `root`: the root of the mean over all images), or None
    where a block has none. A `title` gives it a panel in figures; `span`: the least span of the panel's axis, in its
    `unit`, for "ratio" a factor.
    """

    name: str
    takes: tuple[str, ...]
    function: Callable[..., Tensor | float | None]
    title: str | None = None
    unit: str = ""
    span: float = 0.2
    root: bool = False

    def __call__(self, block: Mapping[str, Any]) -> float | None:
        """None where anything that it takes is None."""
        arguments = [block[name] for name in self.takes]
        value = None if any(argument is None for argument in arguments) else self.function(*arguments)
        return value if value is None else float(torch.as_tensor(value).mean())

    def found_in(self, probe: Mapping[str, Any]) -> list[float | None]:
        """Its numbers in a probe, block by block; empty if that probe has none, as of an earlier version."""
        group, _, own = self.name.partition("/")
        found = probe.get(group, {})
        return found.get(own, []) if own and isinstance(found, Mapping) else found or []


MEASURES: dict[str, Measure] = {}  # name -> measure, in the order of probes and panels


def measure(name: str, *takes: str, **drawn: Any) -> Callable:
    """Registers a function as a measure and returns it. `drawn`: `title`, `unit`, `span`, `root`, see `Measure`."""
    def register(function: Callable) -> Callable:
        MEASURES[name] = Measure(name, takes, function, **drawn)
        return function

    return register
