"""Checkpoints that survive a kill at any moment: tensors and plain JSON, written aside, synced, then renamed."""

import hashlib
import logging
import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from deepvit.engine.folder import RunFolder, aside_of, sync_folder, write_synced
from deepvit.engine.ranks import Ranks
from deepvit.engine.state import TrainState
from deepvit.errors import Failure, UserError, first_line

FORMAT, VERSION = "deepvit", 1
log = logging.getLogger(__name__)


def save(path: Path, content: dict[str, Any], previous: Path | None = None) -> None:
    """Writes `content` to `path`; a kill at any moment leaves the old or the new file whole. The old one moves to
    `previous`. Raises Failure if the disk refused; the old file is intact then and the partial one gone."""
    partial, partial_digest = aside_of(path), aside_of(digest_path(path))
    try:
        write_synced(partial, lambda file: torch.save({"format": FORMAT, "version": VERSION, **content}, file))
        write_synced(partial_digest, lambda file: file.write(f"{_digest(partial)}  {path.name}\n".encode()))
    except (OSError, RuntimeError) as error:  # torch wraps a full disk in a RuntimeError
        partial.unlink(missing_ok=True)
        partial_digest.unlink(missing_ok=True)
        needed, free = size_of(content), shutil.disk_usage(path.parent).free
        raise Failure(f"The checkpoint {path} could not be written ({_reason(error)}): about {needed:,} bytes "
                      f"({_size(needed)}) are needed, {free:,} bytes ({_size(free)}) are free.") from error
    # A kill between any two of these lines leaves a pair that verifies, or a file without digest that loads.
    if previous is not None and path.exists():
        digest_path(previous).unlink(missing_ok=True)
        os.replace(path, previous)
        if digest_path(path).exists():
            os.replace(digest_path(path), digest_path(previous))
    else:
        digest_path(path).unlink(missing_ok=True)
    os.replace(partial, path)
    os.replace(partial_digest, digest_path(path))
    sync_folder(path.parent)


def load(path: Path) -> dict[str, Any]:
    """One of our checkpoints, on the CPU: tensors and plain values. UserError if missing, torn, altered or not ours."""
    if not path.is_file():
        raise UserError(f"There is no checkpoint at {path}.")
    if digest_path(path).exists() and digest_path(path).read_text(errors="replace").split()[:1] != [_digest(path)]:
        raise UserError(f"The checkpoint {path} does not match its sha256: it is torn or was altered.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError, OSError) as error:
        raise UserError(f"The checkpoint {path} cannot be read ({_reason(error)}).") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of a deepvit run: give it to `init=` to start from its weights.")
    return content


def load_newest(*candidates: Path, advice: str = "") -> tuple[Path, dict[str, Any]] | None:
    """The first of `candidates` that is whole; None if none exists; UserError with `advice` if all are torn."""
    broken = []
    for path in filter(Path.exists, candidates):
        try:
            content = load(path)
        except UserError as error:
            broken.append(str(error))
            continue
        if broken:
            log.warning("%s Continuing from %s instead.", " ".join(broken), path)
        return path, content
    if broken:
        raise UserError(" ".join([*broken, "No whole checkpoint is left.", advice]).rstrip())
    return None


class Saver:
    """Writes a run's checkpoints, on rank 0. `identity` is what they hold besides the state, such as the config."""

    def __init__(self, folder: RunFolder, ranks: Ranks, identity: Mapping[str, Any]):
        self._folder, self._ranks, self._identity = folder, ranks, identity

    def save_last(self, state: TrainState, must: bool = False,
                  otherwise: str = "Training goes on and tries again at the next save.") -> bool:
        """Whether the whole state was written; where it `must` be and was not, all ranks fail together."""
        error = self._write(self._folder.last, state, self._whole(state), otherwise, self._folder.previous)
        if must:
            self._ranks.raise_together(error)
        if error is None and self._ranks.is_main:
            self._folder.drop_replaced()
        return error is None

    def save_weights(self, path: Path, state: TrainState, **more: Any) -> None:
        """The weights alone: the best so far, or an epoch's."""
        content = {**state.weights(), "step": state.step, "evaluated": state.evaluated, **more}
        self._write(path, state, content, "These weights are not kept.")

    def save_nonfinite(self, state: TrainState) -> None:
        self._write(self._folder.nonfinite, state, self._whole(state), "The weights cannot be looked at later.")

    def log_sizes(self, state: TrainState) -> None:
        """Says what the run will leave on the disk, and warns where that has no room."""
        if not self._ranks.is_main:
            return
        weights = size_of(state.weights())
        trained = [weight for group in state.optimizer.param_groups for weight in group["params"]]
        # As many moments as Adam's where the optimizer allocates its own only at its first update.
        whole = weights + (size_of(state.optimizer.state_dict()["state"]) or 2 * size_of(trained))
        log.info("Checkpoints: last and previous of %s each, best of %s; engine.keep=best leaves only the best.",
                 _size(whole), _size(weights))
        needed, free = 3 * whole + weights, shutil.disk_usage(self._folder.path).free  # a third while one is written
        if needed > free:
            log.warning("The checkpoints of this run may need %s, and %s are free at %s.", _size(needed), _size(free),
                        self._folder.path)

    def _whole(self, state: TrainState) -> dict[str, Any]:
        return {**state.state_dict(), "world": self._ranks.world}

    def _write(self, path: Path, state: TrainState, content: dict[str, Any], otherwise: str,
               previous: Path | None = None) -> Failure | None:
        """A checkpoint that cannot be written does not end a run that may write its next one."""
        if not self._ranks.is_main:
            return None
        try:
            save(path, {**content, **self._identity}, previous)
            return None
        except Failure as error:
            log.error("%s %s", error, otherwise)
            self._folder.log_event("save_failed", step=state.step, reason=str(error))
            return error


def drop_all_but_best(folder: RunFolder) -> None:
    """Removes the checkpoints that would continue a finished run, if its best weights are there."""
    for path in (folder.last, folder.previous) if folder.best.exists() else ():
        digest_path(path).unlink(missing_ok=True)
        path.unlink(missing_ok=True)


def size_of(content: Any) -> int:
    """Bytes of the tensors in `content`; a file of it is little larger."""
    if isinstance(content, torch.Tensor):
        return content.nbytes
    parts = content.values() if isinstance(content, dict) else content if isinstance(content, list | tuple) else ()
    return sum(map(size_of, parts))


def digest_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _size(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB" if count >= 2**20 else f"{count / 2**10:,.0f} KiB"


def _reason(error: BaseException) -> str:
    cause = error.__context__ if isinstance(error.__context__, OSError) else error  # torch's hides it
    return getattr(cause, "strerror", None) or first_line(cause).rstrip(".")
