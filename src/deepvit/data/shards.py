"""Pictures inside tar files, by their place in bytes: a folder (or a tar) per class, or WebDataset's shards.

Every read opens, seeks and closes: handles shared by forked workers would share one file position.
"""

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from deepvit.data.decode import BadPicture, Picture, Undecoded
from deepvit.data.folders import EXTENSIONS
from deepvit.data.imageset import ImageSet
from deepvit.errors import UserError


class Member(NamedTuple):
    """A file within a tar."""

    shard: int
    name: str
    offset: int  # bytes from the start of the shard
    size: int  # bytes


class TarSet(ImageSet):
    """Pictures at (shard, offset, size)."""

    def __init__(self, shards: list[str], members: list[Member] | np.ndarray, names: np.ndarray, targets: np.ndarray,
                 decoder: str):
        self.shards, self.names, self.targets, self.decoder = shards, names, targets.astype(np.int64), decoder
        self.places = np.array([(one.shard, one.offset, one.size) for one in members], np.int64) \
            if isinstance(members, list) else members  # [n, 3]

    def name(self, index: int) -> str:
        return f"{self.shards[self.places[index, 0]]}:{self.names[index].decode('utf-8', 'surrogateescape')}"

    def size(self, index: int) -> int:
        return int(self.places[index, 2])

    def picture(self, index: int) -> Picture | Undecoded:
        shard, offset, size = self.places[index].tolist()
        try:
            data = read_at(self.shards[shard], offset, size)
        except OSError as error:
            raise BadPicture(f"the file cannot be read ({error.strerror})") from error
        if len(data) < size or not size:
            raise BadPicture("the file ends before the picture does" if size else "the file is empty")
        return self._opened(data)

    def take(self, indices: np.ndarray) -> "TarSet":
        return TarSet(self.shards, self.places[indices], self.names[indices], self.targets[indices], self.decoder)


def read_at(path: str, offset: int, size: int) -> bytearray:
    """`size` bytes from `offset` on; fewer where the file is shorter."""
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        return bytearray(file.read(size) or b"")


def read_class_tars(shards: list[str], decoder: str, class_ids: list[str] | None = None) -> tuple[TarSet, list[str]]:
    """Tars with class folders in them, or one tar per class (also inside a tar) -> (set, class names, sorted).

    class_ids: the classes to expect (of the training split); others are refused.
    """
    pictures = [member for member in _members(shards) if _is_picture(member.name)]
    labels = [_label(shards, member) for member in pictures]
    found = sorted({*labels})
    if class_ids is not None and found != class_ids:
        raise UserError(f"{shards[0]} has other classes than the training pictures: "
                        f"{', '.join(sorted({*found} ^ {*class_ids})[:3])} stand in one of the two only.")
    number = {name: place for place, name in enumerate(found)}
    return _tar_set(shards, pictures, [number[label] for label in labels], decoder), found


def read_webdataset(shards: list[str], decoder: str) -> tuple[TarSet, list[str]]:
    """WebDataset's shards: `key.jpg` beside `key.cls` (an integer) -> (set, class numbers as names)."""
    pictures, classes = {}, {}
    for member in _members(shards):
        folder, name = os.path.split(member.name)
        key = (member.shard, folder, name.split(".")[0])
        if name.endswith(".cls"):
            classes[key] = _class_number(shards, member)
        elif _is_picture(name):
            pictures[key] = member
    lost = next((member for key, member in pictures.items() if key not in classes), None)
    if lost is not None:
        raise UserError(f"{shards[lost.shard]} has {lost.name} without a .cls file beside it that tells its class.")
    targets = [classes[key] for key in pictures]
    names = [str(number) for number in range(max(targets, default=-1) + 1)]
    return _tar_set(shards, list(pictures.values()), targets, decoder), names


def _class_number(shards: list[str], member: Member) -> int:
    text = bytes(read_at(shards[member.shard], member.offset, member.size)).decode("ascii", "replace").strip()
    if not text.isdecimal():
        raise UserError(f"{shards[member.shard]}: {member.name} should hold the number of a class, not '{text[:20]}'.")
    return int(text)


def _tar_set(shards: list[str], pictures: list[Member], targets: list[int], decoder: str) -> TarSet:
    if not pictures:
        raise UserError(f"{shards[0]} holds no pictures.")
    names = np.array([os.fsencode(member.name) for member in pictures])
    return TarSet(shards, pictures, names, np.array(targets), decoder)


def _is_picture(name: str) -> bool:
    return os.fsencode(name).lower().endswith(EXTENSIONS) and not os.path.basename(name).startswith(".")


def _label(shards: list[str], member: Member) -> str:
    return Path(member.name).parent.name or Path(shards[member.shard]).stem


def _members(shards: list[str]) -> Iterator[Member]:
    for shard, path in enumerate(shards):
        try:
            with tarfile.open(path, "r:") as tar:
                yield from _walk(tar, shard, "", 0)
        except (tarfile.TarError, OSError) as error:
            raise UserError(f"{path} cannot be read as an uncompressed tar file ({error}).") from error


def _walk(tar: tarfile.TarFile, shard: int, prefix: str, start: int) -> Iterator[Member]:
    for member in tar:
        if not member.isfile():
            continue
        if member.name.endswith(".tar"):
            with tarfile.open(fileobj=tar.extractfile(member), mode="r:") as inner:
                yield from _walk(inner, shard, member.name.removesuffix(".tar") + "/", start + member.offset_data)
        else:
            yield Member(shard, prefix + member.name, start + member.offset_data, member.size)
        tar.members = []  # tarfile would keep every header
