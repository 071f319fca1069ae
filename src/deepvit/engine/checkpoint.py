"""Checkpoints that survive a kill at any moment: tensors and plain JSON, written aside, synced, then renamed."""

import hashlib
import logging
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from deepvit.errors import Failure, UserError, first_line

FORMAT, VERSION = "deepvit", 1
log = logging.getLogger(__name__)


def save(path: Path, content: dict[str, Any], previous: Path | None = None) -> None:
    """Writes `content` to `path`; a kill at any moment leaves the old or the new file whole.

    Args:
        previous: where the file that stands at `path` goes, so that two good checkpoints exist.
    Raises:
        Failure: the disk refused (full, read-only); the old file is intact and the partial one gone.
    """
    partial, partial_digest = (_aside(one) for one in (path, digest_path(path)))
    try:
        _write(partial, lambda file: torch.save({"format": FORMAT, "version": VERSION, **content}, file))
        _write(partial_digest, lambda file: file.write(f"{_digest(partial)}  {path.name}\n".encode()))
    except (OSError, RuntimeError) as error:  # torch wraps a full disk in a RuntimeError
        partial.unlink(missing_ok=True)
        partial_digest.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free
        raise Failure(f"The checkpoint {path} could not be written ({_reason(error)}): about {_size(size_of(content))} "
                      f"are needed, {_size(free)} are free.") from error
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


def load(path: Path) -> dict[str, Any]:
    """One of our checkpoints, on the CPU, its digest checked. Nothing but tensors and plain values is ever unpickled.

    Raises:
        UserError: missing, torn, altered, poisoned, or not one of ours.
    """
    if not path.is_file():
        raise UserError(f"There is no checkpoint at {path}.")
    if digest_path(path).exists() and digest_path(path).read_text().split()[:1] != [_digest(path)]:
        raise UserError(f"The checkpoint {path} does not match its sha256: it is torn or was altered.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError, OSError) as error:
        raise UserError(f"The checkpoint {path} cannot be read ({_reason(error)}).") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is no checkpoint of a deepvit run: give it to `init=` to start from its weights.")
    return content


def load_newest(*candidates: Path, advice: str = "") -> tuple[Path, dict[str, Any]] | None:
    """The first of `candidates` that is whole; each one that is not is named. None if none exists.

    Raises:
        UserError: some exist and none is whole; ends with `advice`.
    """
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


def write_text_synced(path: Path, text: str) -> None:
    """Replaces a small file atomically."""
    _write(_aside(path), lambda file: file.write(text.encode()))
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


def _write(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    with path.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


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
    return getattr(cause, "strerror", None) or first_line(cause).rstrip(".")
