"""Checkpoints that survive a kill at any moment: tensors and plain JSON, written aside, synced, then renamed."""

import hashlib
import logging
import os
import pickle
import shutil
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
    partial, partial_digest = (_aside(one) for one in (path, digest_path(path)))
    try:
        digest = _write_synced(partial, {"format": FORMAT, "version": VERSION, **content})
        _write_text(partial_digest, f"{digest}  {path.name}\n")
    except (OSError, RuntimeError) as error:  # torch wraps a full disk in a RuntimeError
        needed = size_of(content)
        partial.unlink(missing_ok=True)
        partial_digest.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free
        raise Failure(f"The checkpoint {path} could not be written ({_reason(error)}): about {_size(needed)} are "
                      f"needed, {_size(free)} are free.") from error
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
    _sync_folder(path.parent)


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


def load_newest(*candidates: Path, advice: str = "") -> tuple[Path, dict[str, Any]] | None:
    """The first of `candidates` that is whole; each one that is not is named. None if none exists.

    Args:
        advice: said where none is whole.

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
        raise UserError(" ".join([*broken, "No whole checkpoint is left.", advice]).rstrip())
    return None


def write_text_synced(path: Path, text: str) -> None:
    """Replaces a small file atomically."""
    _write_text(_aside(path), text)
    os.replace(_aside(path), path)
    _sync_folder(path.parent)


def size_of(content: Any) -> int:
    """Bytes of the tensors in `content`; a file of it is little larger."""
    if isinstance(content, torch.Tensor):
        return content.nbytes
    if isinstance(content, dict):
        content = content.values()
    elif not isinstance(content, (list, tuple)):
        return 8
    return sum(map(size_of, content))


def digest_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _aside(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def _write_text(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


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


def _size(count: int) -> str:
    """12,345,678 -> "12,345,678 bytes (12 MiB)"."""
    return f"{count:,} bytes ({count / 2**20:.0f} MiB)"


def _reason(error: BaseException) -> str:
    cause = error.__context__ if isinstance(error.__context__, OSError) else error  # torch's hides it
    return cause.strerror if isinstance(cause, OSError) and cause.strerror else _first_line(cause)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
