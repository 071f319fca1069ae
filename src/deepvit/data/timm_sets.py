"""timm's data sets by timm's names: Hugging Face's and torchvision's through timm, tar files by an index of our own.
Every read of a tar opens, seeks and closes: forked workers that share a handle would share one file position."""

import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from deepvit.data.decode import AnyImage, BadImage, as_array, read_bytes
from deepvit.data.imageset import ImageSet, Splits
from deepvit.data.listing import EXTENSIONS, KINDS, class_folders, class_order, entries, existing, log_left_out
from deepvit.data.source import Source, refuse_other_classes
from deepvit.errors import UserError, some

NUMBERS = ("wnid_to_idx", "class_to_idx", "class_name_to_idx")  # of classes; torchvision's ImageNet has synonyms second
WORDS = ("val", "validation", "test")  # for the same split


class TimmSet(ImageSet):
    """A map-style data set made by timm.data.create_dataset; `rows` are places in it."""

    def __init__(self, dataset: object, targets: np.ndarray, label: str, decoder: str):
        self.dataset, self.label, self.decoder = dataset, label, decoder
        self.targets, self.rows = targets.astype(np.int64), np.arange(len(targets))

    def name(self, index: int) -> str:
        row = int(self.rows[index])
        has_names = hasattr(self.dataset, "filename")  # torchvision's data sets do not
        return f"{self.label}/{self.dataset.filename(row) if has_names else row}"

    def image(self, index: int) -> AnyImage:
        try:
            content = getattr(self.dataset, "reader", self.dataset)[int(self.rows[index])][0]
        except (OSError, ValueError, SyntaxError) as error:
            raise BadImage(f"it is damaged ({error})") from error
        if isinstance(content, Image.Image):
            image = content.convert("RGB")
            return image if self.decoder == "pil" else pil_to_tensor(image)
        return self._opened(bytearray(content if isinstance(content, bytes) else content.read()))


class Member(NamedTuple):  # a file in a tar; offset and size are bytes
    shard: int
    name: str
    offset: int
    size: int


class TarSet(ImageSet):
    """Images at (shard, offset, size). Raises UserError where there are none."""

    def __init__(self, shards: list[str], members: list[Member], targets: Sequence[int], decoder: str):
        if not members:
            raise UserError(f"{shards[0]} holds no images ({KINDS}).")
        self.shards, self.targets, self.decoder = shards, np.array(targets, np.int64), decoder
        self.names = np.array([os.fsencode(member.name) for member in members])
        self.places = np.array([(one.shard, one.offset, one.size) for one in members], np.int64)  # [n, 3]

    def name(self, index: int) -> str:
        return f"{self.shards[self.places[index, 0]]}:{os.fsdecode(self.names[index])}"

    def size(self, index: int) -> int:
        return int(self.places[index, 2])

    def image(self, index: int) -> AnyImage:
        shard, offset, size = self.places[index].tolist()
        data = read_bytes(self.shards[shard], offset, size)
        if len(data) < size:
            raise BadImage("the file ends before the image does")
        return self._opened(data)


class Timm(Source):
    """`data=timm`, of name `hfds/...`, `torch/...`, `wds/...`, or empty for tars with a folder or a tar per class. Tars
    are found as `root` itself, `root/<split>.tar`, `root/<split>/*.tar` or `root/*<split>*.tar`."""

    source = "timm"
    may_download = True

    def whole(self) -> Splits:
        prefix = (self.name or "").partition("/")[0].lower()
        if prefix in ("", "wds"):
            root = Path(self.root or "").expanduser()
            root = root if root.suffix == ".tar" and root.is_file() else existing(self.root, "timm")
            read = read_webdataset if prefix == "wds" else read_class_tars
            where, found = str(root), [read(tars, self.decoder) for tars in self._tars(root)]
        else:
            splits = [self.train_split] if self.val_fraction else [self.train_split, self.val_split]
            where, found = self.name, [self._created(split) for split in splits]
            if len(found) > 1 and _are_same(found[0][0], found[1][0]):
                raise UserError(f"data.name={self.name} gives the same images for data.train_split={self.train_split} "
                                f"and data.val_split={self.val_split}: change these, or give data.val_fraction=0.1 to "
                                f"hold out a tenth of each class.")
        train, ids = found[0]
        if self.val_fraction:
            return self.hold_out(train, ids, where)
        val, val_ids = found[1]
        if prefix == "wds":  # the classes are numbers, of which a split may lack the last
            ids = max(ids, val_ids, key=len)
        else:
            refuse_other_classes(ids, val_ids, self.train_split, self.val_split)
        return Splits(train, val, ids)

    def _tars(self, path: Path) -> list[list[str]]:
        """Of the splits for training and validation; of the former alone where `val_fraction` of it is held out."""
        train_tars, val_tars = _shards(path, self.train_split), _shards(path, self.val_split)
        needed = [(self.train_split, train_tars), (self.val_split, val_tars)][:1 if self.val_fraction else 2]
        for split, tars in needed:
            if not tars:
                raise UserError(f"data.root={path} has no tar files of the split {split}, such as {split}.tar.")
        unused = sorted({*val_tars} - {*train_tars})
        if self.val_fraction and unused:
            raise UserError(f"data.root={path} has {unused[0]}, which data.val_fraction={self.val_fraction} would not "
                            f"use: leave data.val_fraction out, or move it away.")
        if len(unused) < len(val_tars) and not self.val_fraction:
            raise UserError(f"The same tars, such as {train_tars[0]}, fit data.train_split and val_split: rename them, "
                            f"or give data.val_fraction=0.1 to hold out a tenth of each class.")
        return [tars for _, tars in needed]

    def _created(self, split: str) -> tuple[TimmSet, list[str]]:
        """A split as timm makes it, and its classes."""
        from timm.data import create_dataset
        try:
            dataset = create_dataset(self.name, root=self.root, split=split, download=True)
        except Exception as error:  # of the library behind the name: not installed, a wrong name, split, root, network
            raise UserError(f"timm cannot open data.name={self.name}, split {split}, root {self.root}: "
                            f"{str(error) or type(error).__name__}.") from error
        reader = getattr(dataset, "reader", dataset)
        if hasattr(reader, "label_key"):  # Hugging Face: a column
            targets = np.asarray(reader.dataset[reader.label_key])
        elif hasattr(reader, "targets"):
            targets = np.asarray(reader.targets)
        else:
            targets = np.asarray([target for _, target in getattr(reader, "samples", [])])
        if not len(targets):
            raise UserError(f"data.name={self.name}, split {split}: it has no list of the images' classes.")
        numbers = next(filter(None, (getattr(reader, name, None) for name in NUMBERS)), {})
        ids = sorted(numbers, key=numbers.get) or [str(number) for number in range(int(targets.max()) + 1)]
        return TimmSet(dataset, targets, f"{self.name}/{split}", self.decoder), ids


def _are_same(one: TimmSet, other: TimmSet) -> bool:
    """Whether two splits are one, as timm gives them of a folder without folders of these names: by their classes, and
    three of the images."""
    if not np.array_equal(one.targets, other.targets):
        return False
    for place in {0, len(one) // 2, len(one) - 1}:
        with suppress(BadImage):  # its reason is told when it is asked for
            if not np.array_equal(*(as_array(images.image(place)) for images in (one, other))):
                return False
    return True


def _shards(path: Path, split: str) -> list[str]:
    """The tars of a split: the path itself, or by name in a folder; none if none is called so."""
    if path.is_file():
        return [str(path)]
    tars, folders = _tars_in(path), class_folders(path)
    for word in (split, *(WORDS if split in WORDS else ())):
        whole_word = re.compile(rf"(?<![a-zA-Z]){re.escape(word)}(?![a-zA-Z])")  # in `small-train-0`, not `constrained`
        found = [tar for tar in tars if tar.stem == word] + (_tars_in(path / word) if word in folders else [])
        if found := found or [tar for tar in tars if whole_word.search(tar.stem)]:
            return [str(tar) for tar in found]
    return []


def _tars_in(folder: Path) -> list[Path]:
    return sorted(Path(entry.path) for entry in entries(folder) if entry.name.endswith(".tar") and entry.name[0] != ".")


def read_class_tars(shards: list[str], decoder: str) -> tuple[TarSet, list[str]]:
    """Tars of class folders, or a tar per class (also inside a tar) -> (set, class names in `class_order`)."""
    members = [*_members(shards)]
    images = [member for member in members if not _fault(member.name)]
    log_left_out(some(shards, 1), Counter(filter(None, (_fault(member.name) for member in members))))
    labels = [Path(member.name).parent.name or Path(shards[member.shard]).stem for member in images]
    classes = class_order(labels)
    number = {name: place for place, name in enumerate(classes)}
    return TarSet(shards, images, [number[label] for label in labels], decoder), classes


def read_webdataset(shards: list[str], decoder: str) -> tuple[TarSet, list[str]]:
    """WebDataset's shards: `key.jpg` beside `key.cls` (an integer) -> (set, class numbers as names). A key ends at the
    first dot of a name."""
    images: dict[tuple[int, str, str], Member] = {}  # by shard, folder and key
    classes: dict[tuple[int, str, str], Member] = {}
    for member in _members(shards):
        is_class, (folder, name) = member.name.endswith(".cls"), os.path.split(member.name)
        if is_class or not _fault(member.name):
            key = name.split(".")[0]
            first = (classes if is_class else images).setdefault((member.shard, folder, key), member)
            if first is not member:
                raise UserError(f"{shards[member.shard]}: there is one key, '{key}', for {first.name} and "
                                f"{member.name}; each image needs a key of its own, up to the first dot of its name.")
    if alone := next((image for place, image in images.items() if place not in classes), None):
        raise UserError(f"{shards[alone.shard]}: there is {alone.name} without a .cls file of its key, which gives its "
                        f"class.")
    log_left_out(some(shards, 1), {".cls without an image": len(classes) - len(images)})
    targets = [_class_number(shards[member.shard], member) for member in map(classes.get, images)]
    names = [str(number) for number in range(max(targets, default=-1) + 1)]
    return TarSet(shards, [*images.values()], targets, decoder), names


def _class_number(path: str, member: Member) -> int:
    try:
        text = read_bytes(path, member.offset, member.size).decode("ascii", "replace").strip()
    except BadImage as reason:
        raise UserError(f"{path}: {reason}.") from reason
    if not text.isdecimal():
        raise UserError(f"{path}: {member.name} should hold a class number, not '{text[:20]}'.")
    return int(text)


def _fault(name: str) -> str:
    """Why a file in a tar is no image; empty for one that is."""
    if os.path.basename(name).startswith("."):
        return "hidden"
    extension = os.path.splitext(name)[1]
    return "" if os.fsencode(extension).lower() in EXTENSIONS else extension or "without extension"


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
