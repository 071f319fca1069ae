"""Images inside tar files, by their place in bytes: a folder (or a tar) per class, or WebDataset's shards.

Every read opens, seeks and closes: handles shared by forked workers would share one file position.
"""

import logging
import os
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from deepvit.data.decode import BadImage, AnyImage
from deepvit.data.imageset import ImageSet
from deepvit.data.listing import EXTENSIONS, KINDS, in_words
from deepvit.errors import UserError

log = logging.getLogger(__name__)


class Member(NamedTuple):
    """A file within a tar."""

    shard: int
    name: str
    offset: int  # bytes from the start of the shard
    size: int  # bytes


class TarSet(ImageSet):
    """Images at (shard, offset, size). Raises UserError where there are none."""

    per_image = ("targets", "names", "places")

    def __init__(self, shards: list[str], members: list[Member], targets: list[int], decoder: str):
        if not members:
            raise UserError(f"{shards[0]} holds no images ({KINDS}).")
        self.shards, self.targets, self.decoder = shards, np.array(targets, np.int64), decoder
        self.names = np.array([os.fsencode(member.name) for member in members])
        self.places = np.array([(one.shard, one.offset, one.size) for one in members], np.int64)  # [n, 3]

    def name(self, index: int) -> str:
        return f"{self.shards[self.places[index, 0]]}:{self.names[index].decode('utf-8', 'surrogateescape')}"

    def size(self, index: int) -> int:
        return int(self.places[index, 2])

    def image(self, index: int) -> AnyImage:
        shard, offset, size = self.places[index].tolist()
        try:
            data = read_at(self.shards[shard], offset, size)
        except OSError as error:
            raise BadImage(f"the file cannot be read ({error.strerror})") from error
        if len(data) < size or not size:
            raise BadImage("the file ends before the image does" if size else "the file is empty")
        return self._opened(data)


def read_at(path: str, offset: int, size: int) -> bytearray:
    """`size` bytes from `offset` on; fewer where the file is shorter."""
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        return bytearray(file.read(size) or b"")


def read_class_tars(shards: list[str], decoder: str, class_ids: list[str] | None = None) -> tuple[TarSet, list[str]]:
    """Tars with class folders in them, or one tar per class (also inside a tar) -> (set, class names, sorted).

    class_ids: the classes to expect (of the training split); others are refused.
    """
    members = [*_members(shards)]
    images = [member for member in members if _is_image(member.name)]
    _say_left_out(shards, Counter(_reason(member.name) for member in members if not _is_image(member.name)))
    labels = [Path(member.name).parent.name or Path(shards[member.shard]).stem for member in images]
    found = sorted({*labels})
    if class_ids is not None and found != class_ids:
        raise UserError(f"{shards[0]} has other classes than the training images: "
                        f"{', '.join(sorted({*found} ^ {*class_ids})[:3])} stand in one of the two only.")
    number = {name: place for place, name in enumerate(found)}
    return TarSet(shards, images, [number[label] for label in labels], decoder), found


def read_webdataset(shards: list[str], decoder: str) -> tuple[TarSet, list[str]]:
    """WebDataset's shards: `key.jpg` beside `key.cls` (an integer) -> (set, class numbers as names).

    A key ends at the first dot of a name; where that gives one key two images, and only there, at the last.
    """
    members = [*_members(shards)]
    images = [member for member in members if _is_image(member.name)]
    classes = [member for member in members if member.name.endswith(".cls")]
    try:
        pairs = _paired(shards, images, classes, lambda name: name.split(".")[0])
    except UserError as fault:
        try:
            pairs = _paired(shards, images, classes, lambda name: os.path.splitext(name)[0])
        except UserError:
            raise fault from None
    _say_left_out(shards, Counter({".cls without an image": len(classes) - len(pairs)}))
    targets = [_class_number(shards, member) for _, member in pairs]
    names = [str(number) for number in range(max(targets, default=-1) + 1)]
    return TarSet(shards, [image for image, _ in pairs], targets, decoder), names


def _paired(shards: list[str], images: list[Member], classes: list[Member], stem: Callable[[str], str]
            ) -> list[tuple[Member, Member]]:
    """Each image with the class of its key: the shard, the folder, and the `stem` of the name."""
    def unpaired(key: tuple[int, str, str], fault: str) -> UserError:
        return UserError(f"{shards[key[0]]}: there is {fault}; each image needs one .cls file of its key (the name up "
                         f"to the first dot).")

    def by_key(members: list[Member]) -> dict[tuple[int, str, str], list[Member]]:
        found = defaultdict(list)
        for member in members:
            folder, name = os.path.split(member.name)
            found[member.shard, folder, stem(name)].append(member)
        return found

    pairs, classes_of = [], by_key(classes)
    for key, alike in by_key(images).items():
        labels = classes_of.get(key, [])
        for members in (alike, labels):
            if len(members) > 1:
                raise unpaired(key, f"one key, '{key[-1]}', for {members[0].name} and {members[1].name}")
        if not labels:
            raise unpaired(key, f"{alike[0].name} without a .cls file beside it that tells its class")
        pairs.append((alike[0], labels[0]))
    return pairs


def _class_number(shards: list[str], member: Member) -> int:
    text = bytes(read_at(shards[member.shard], member.offset, member.size)).decode("ascii", "replace").strip()
    if not text.isdecimal():
        raise UserError(f"{shards[member.shard]}: {member.name} should hold the number of a class, not '{text[:20]}'.")
    return int(text)


def _is_image(name: str) -> bool:
    return os.fsencode(name).lower().endswith(EXTENSIONS) and not os.path.basename(name).startswith(".")


def _reason(name: str) -> str:
    return "hidden" if os.path.basename(name).startswith(".") else os.path.splitext(name)[1] or "without extension"


def _say_left_out(shards: list[str], left_out: Counter[str]) -> None:
    if left_out := +left_out:
        log.warning("In %s%s %s Images are %s.", shards[0], ", ..." if len(shards) > 1 else "", in_words(left_out),
                    KINDS)


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
