"""Where a run's numbers go: `metrics.jsonl` always, and the viewers that `logger` names. A viewer is a class with the
methods of `Logger` and a line in `LOGGERS`; where it cannot be written, the run goes on without it."""

import functools
import html
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import yaml

from deepvit.config.compare import flat
from deepvit.engine.folder import RunFolder
from deepvit.errors import UserError, choose

NOT_CURVES = {"n", "images", "tokens", "heads", "blocks", "norm_eps", "adjacent"}  # constants, or summarised by a mean

Draw = Callable[[], Mapping[str, np.ndarray]]  # images by name, uint8 [height, width, 3]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoggedRun:
    """What a logger knows of its run: `id` stays the same when the run is resumed, at `step`."""

    folder: RunFolder
    id: str
    step: int
    settings: Mapping[str, Any]


class Logger(Protocol):
    """Called on rank 0 alone. Its constructor takes a `LoggedRun`; `needs` names the package that it imports there.
    `log_scalars` takes the values of a group (train, val, attention): numbers, or mappings and lists (an entry per
    block) of them. `log_images` calls `draw` if it shows images. `log_result` takes what a finished run came to. A
    class derived from this one need not define the methods that it has no use for."""

    needs: str

    def log_scalars(self, group: str, values: Mapping[str, Any], step: int, epoch: float) -> None: ...
    def log_images(self, draw: Draw, step: int) -> None: ...
    def log_text(self, name: str, text: str, step: int) -> None: ...
    def log_result(self, metrics: Mapping[str, float], step: int) -> None: ...
    def close(self) -> None: ...


class JsonLines(Logger):
    """`metrics.jsonl`, the record that reports are made from: a line for each call; no images, no text."""

    def __init__(self, run: LoggedRun):
        self._folder = run.folder

    def log_scalars(self, group: str, values: Mapping[str, Any], step: int, epoch: float) -> None:
        values = {"probe": values} if group == "attention" else values
        self._folder.log_metrics({"step": step, "epoch": epoch, **values})


class TensorBoard:
    """Curves, images, the settings as text and, when the run is finished, its row in the hparams tab."""

    needs = "tensorboard"

    def __init__(self, run: LoggedRun):
        from torch.utils.tensorboard import SummaryWriter
        self._settings = run.settings
        self._writer = SummaryWriter(run.folder.path, purge_step=run.step + 1)  # an earlier process may have gone on
        self.log_text("settings", yaml.safe_dump(dict(run.settings), sort_keys=False), run.step)

    def log_scalars(self, group: str, values: Mapping[str, Any], step: int, epoch: float) -> None:
        for name, value in curves(values):
            self._writer.add_scalar(f"{group}/{name}", value, step)

    def log_images(self, draw: Draw, step: int) -> None:
        for name, pixels in draw().items():
            self._writer.add_image(name, pixels, step, dataformats="HWC")

    def log_text(self, name: str, text: str, step: int) -> None:
        self._writer.add_text(name, "\n".join(f"    {line}" for line in text.splitlines()), step)  # Markdown: as it is

    def log_result(self, metrics: Mapping[str, float], step: int) -> None:
        from torch.utils.tensorboard.summary import hparams
        named = {f"result/{name}": value for name, value in metrics.items()}
        settings = {name: value if isinstance(value, (bool, int, float, str)) else str(value)
                    for name, value in flat(self._settings) if not isinstance(value, Mapping)}
        for summary in hparams(settings, named):  # add_hparams would open a run of its own
            self._writer._get_file_writer().add_summary(summary)
        for name, value in named.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """Weights & Biases, in the project that WANDB_PROJECT names; WANDB_MODE=offline needs no account."""

    needs = "wandb"

    def __init__(self, run: LoggedRun):
        import wandb
        self._wandb = wandb
        try:
            self._run = wandb.init(project=os.environ.get("WANDB_PROJECT", "deepvit"), id=run.id, resume="allow",
                                   name=run.folder.path.name, dir=run.folder.path, config=dict(run.settings))
        except wandb.Error as error:
            raise UserError(f"logger=wandb cannot start ({str(error).splitlines()[0]}): run `wandb login`, or set "
                            f"WANDB_MODE=offline.") from error
        self._run.define_metric("*", step_metric="step")  # its own count cannot go back to where a run resumes

    def log_scalars(self, group: str, values: Mapping[str, Any], step: int, epoch: float) -> None:
        self._run.log({**{f"{group}/{name}": value for name, value in curves(values)}, "epoch": epoch, "step": step})

    def log_images(self, draw: Draw, step: int) -> None:
        self._run.log({**{name: self._wandb.Image(pixels) for name, pixels in draw().items()}, "step": step})

    def log_text(self, name: str, text: str, step: int) -> None:
        self._run.log({name: self._wandb.Html(f"<pre>{html.escape(text)}</pre>"), "step": step})

    def log_result(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.summary.update({f"result/{name}": value for name, value in metrics.items()})

    def close(self) -> None:
        self._run.finish()


LOGGERS: dict[str, type[Logger]] = {"tensorboard": TensorBoard, "wandb": WandB}


def chosen(names: str | Sequence[str] | None) -> list[type[Logger]]:
    """The viewers that `logger` names. Raises UserError for an unknown name or a missing package."""
    names = [names] if isinstance(names, str) else names or []
    for name in names:
        if importlib.util.find_spec(needs := choose("logger", name, LOGGERS).needs) is None:
            raise UserError(f"logger={name} needs a package that is not installed: pip install {needs}")
    return [LOGGERS[name] for name in names]


class Loggers:
    """`metrics.jsonl` and viewers as one logger; without a run (on all ranks but the first) it does nothing."""

    def __init__(self, run: LoggedRun | None = None, viewers: Sequence[type[Logger]] = ()):
        self._loggers: list[Logger] = [JsonLines(run)] if run else []
        for viewer in viewers if run else ():
            self._try(viewer, lambda make=viewer: self._loggers.append(make(run)))

    def _call(self, method: str, *arguments: Any) -> None:
        for logger in list(self._loggers):
            if not self._try(type(logger), functools.partial(getattr(logger, method), *arguments)):
                self._loggers.remove(logger)

    log_scalars = functools.partialmethod(_call, "log_scalars")
    log_text = functools.partialmethod(_call, "log_text")
    log_result = functools.partialmethod(_call, "log_result")
    close = functools.partialmethod(_call, "close")

    def log_images(self, draw: Draw, step: int) -> None:
        self._call("log_images", functools.cache(draw), step)  # drawn once for all

    @staticmethod
    def _try(kind: type[Logger], action: Callable[[], Any]) -> bool:
        try:
            action()
        except (OSError, UnicodeEncodeError) as error:  # the latter: a folder's name that is not UTF-8
            log.warning("%s cannot be written (%s) and is left out from now on; metrics.jsonl still has every number.",
                        kind.__name__, getattr(error, "strerror", None) or error)
            return False
        return True


def curves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of `values` that change, by their path; the mean of those that have an entry per block."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from curves(value, f"{prefix}{name}/")
        elif name not in NOT_CURVES and value is not None:
            known = [one for one in value if one is not None] if isinstance(value, list) else [value]
            if known:
                yield f"{prefix}{name}", sum(known) / len(known)
