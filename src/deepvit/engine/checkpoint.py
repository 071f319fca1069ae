"""Checkpoints that survive a kill at any moment: tensors and plain JSON, written aside, synced, then renamed."""

import hashlib
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import torch

from deepvit.errors import Failure, UserError

FORMAT, VERSION = "deepvit", 1
log = logging.getLogger(__name__)


def save(path: Path, content: dict[str, Any], previous: Path | None = None) -> None:
    """Writes `content` to `path`; a kill at any moment leaves the old or the new file, never half of one.

    Args:
        previous: where the file that stands at `path` goes, so that two good checkpoints exist.
    Raises:
        Failure: the disk refused (full, read-only); the old file is intact and the partial one gone.
    """
    partial = path.with_name(path.name + ".tmp")
    try:
        digest = _write_synced(partial, {"format": FORMAT, "version": VERSION, **content})
    except (OSError, RuntimeError) as error:  # torch wraps a full disk in a RuntimeError
        needed = _bytes(content)
        partial.unlink(missing_ok=True)
        status = os.statvfs(path.parent)
        raise Failure(f"The checkpoint {path} could not be written ({_reason(error)}): about {needed / 2**20:.0f} MiB "
                      f"are needed, {status.f_bavail * status.f_frsize / 2**20:.0f} MiB are free.") from error
    # A kill between any two of these lines leaves a pair that verifies, or a file without digest that loads.
    if previous is not None and path.exists():
        if digest_path(path).exists():
            os.replace(digest_path(path), digest_path(previous))
        os.replace(path, previous)
    else:
        digest_path(path).unlink(missing_ok=True)
    os.replace(partial, path)
    write_text_synced(digest_path(path), f"{digest}  {path.name}\n")


def load(path: Path, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Reads one of our checkpoints, its digest checked. Nothing but tensors and plain values is ever unpickled.

    Raises:
        UserError: missing, torn, altered, poisoned, or not one of ours.
    """
    if not path.is_file():
        raise UserError(f"There is no checkpoint at {path}.")
    if digest_path(path).exists() and digest_path(path).read_text().split()[:1] != [_digest(path)]:
        raise UserError(f"The checkpoint {path} does not match its sha256: it is torn or was altered.")
    try:
        content = torch.load(path, map_location=map_location, weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError, OSError) as error:
        raise UserError(f"The checkpoint {path} cannot be read ({_reason(error)}).") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is no checkpoint of a deepvit run: give it to `init=` to start from its weights.")
    return content


def load_newest(*candidates: Path) -> tuple[Path, dict[str, Any]] | None:
    """The first of `candidates` that is whole; each one that is not is named. None if none exists.

    Raises:
        UserError: some exist and none is whole.
    """
    broken = []
    for path in candidates:
        if not path.exists():
            continue
        try:
            content = load(path)
        except UserError as error:
            broken.append(str(error))
            continue
        if broken:
            log.warning("%s Continuing from %s instead.", " ".join(broken), path)
        return path, content
    if broken:
        raise UserError(" ".join(broken) + " No whole checkpoint is left: fresh=true starts over.")
    return None


def write_text_synced(path: Path, text: str) -> None:
    """Replaces a small file atomically."""
    partial = path.with_name(path.name + ".tmp")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    _sync_folder(path.parent)


def digest_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _write_synced(path: Path, content: dict[str, Any]) -> str:
    with path.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    return _digest(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _bytes(content: Any) -> int:
    if isinstance(content, torch.Tensor):
        return content.nbytes
    if isinstance(content, dict):
        content = content.values()
    elif not isinstance(content, (list, tuple)):
        return 8
    return sum(map(_bytes, content))


def _reason(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
