"""timm's data sets by timm's names: Hugging Face's and torchvision's through timm, tar files by our own index."""

import re
from pathlib import Path

import numpy as np
from PIL import Image

from deepvit.data.decode import BadImage, AnyImage, to_tensor
from deepvit.data.folders import class_folders, existing, readable_names
from deepvit.data.imageset import ImageSet, Splits
from deepvit.data.listing import entries
from deepvit.data.shards import read_class_tars, read_webdataset
from deepvit.data.source import Source
from deepvit.errors import UserError

STREAMS = ("hfids", "tfds")  # timm reads these front to back only
WORDS = ("val", "validation", "test")  # for the same split


class TimmSet(ImageSet):
    """A map-style data set made by timm.data.create_dataset; `rows` are places in it."""

    per_image = ("targets", "rows")

    def __init__(self, dataset: object, targets: np.ndarray, label: str, decoder: str):
        self.dataset, self.label, self.decoder = dataset, label, decoder
        self.targets, self.rows = targets.astype(np.int64), np.arange(len(targets))

    def name(self, index: int) -> str:
        row = int(self.rows[index])
        try:
            return f"{self.label}/{self.dataset.filename(row)}"
        except AttributeError:  # torchvision's data sets have no names
            return f"{self.label}/{row}"

    def image(self, index: int) -> AnyImage:
        row = int(self.rows[index])
        reader = getattr(self.dataset, "reader", None)
        try:
            content = self.dataset[row][0] if reader is None else reader[row][0]
        except (OSError, ValueError, SyntaxError) as error:
            raise BadImage(f"it is damaged ({error})") from error
        if isinstance(content, Image.Image):
            image = content.convert("RGB")
            return image if self.decoder == "pil" else to_tensor(image)
        data = bytearray(content if isinstance(content, bytes) else content.read())
        if not data:
            raise BadImage("the file is empty")
        return self._opened(data)


class Timm(Source):
    """`data=timm`, of name `hfds/...`, `torch/...`, `wds/...`, or empty for tars with a folder or a tar per class.

    Tars are found as `root` itself, `root/<split>.tar`, `root/<split>/*.tar` or `root/*<split>*.tar`.
    """

    source = "timm"
    may_download = True

    def whole(self) -> Splits:
        prefix = (self.name or "").partition("/")[0].lower()
        if prefix in STREAMS:
            raise UserError(f"data.name={self.name}: timm reads {prefix}/ data sets only front to back, so no image "
                            f"can be asked for by its number; use hfds/, torch/, or tar files.")
        if prefix in ("", "wds"):
            path = Path(self.root or "").expanduser()
            is_tar = self.root and path.is_file() and path.suffix == ".tar"
            return self._tars(path if is_tar else existing(self.root, "timm"), prefix == "wds")
        train, ids = self._created(self.train_split)
        if self.val_fraction:
            return self.hold_out(train, ids, self.name)
        val, val_ids = self._created(self.val_split)
        if val_ids != ids:
            raise UserError(f"data.name={self.name}: the splits {self.train_split} and {self.val_split} have different "
                            f"classes.")
        return Splits(train, val, readable_names(ids), ids)

    def _tars(self, path: Path, is_webdataset: bool) -> Splits:
        read = read_webdataset if is_webdataset else read_class_tars
        train_tars = _shards(path, self.train_split)
        train, ids = read(train_tars, self.decoder)
        val_tars = [] if path.is_file() else _find_shards(path, self.val_split)
        unused = sorted({*val_tars} - {*train_tars})
        if self.val_fraction and unused:
            raise UserError(f"data.root={path} has {unused[0]}, which data.val_fraction={self.val_fraction} would not "
                            f"use: leave data.val_fraction out, or move it away.")
        if self.val_fraction:
            return self.hold_out(train, ids, str(path))
        if path.is_file():
            raise UserError(f"{path} is a single tar: give data.val_fraction=0.1 to hold out a tenth of each class.")
        if len(unused) < len(val_tars):
            raise UserError(f"data.root={path}: the same tars are found for data.train_split={self.train_split} and "
                            f"data.val_split={self.val_split}, such as {train_tars[0]}: rename them after one split "
                            f"each.")
        val_tars = _shards(path, self.val_split)
        if not is_webdataset:
            return Splits(train, read_class_tars(val_tars, self.decoder, ids)[0], readable_names(ids), ids)
        val, val_ids = read_webdataset(val_tars, self.decoder)
        ids = max(ids, val_ids, key=len)
        return Splits(train, val, ids, ids)

    def _created(self, split: str) -> tuple[TimmSet, list[str]]:
        """A split as timm makes it, and its classes."""
        from timm.data import create_dataset
        try:
            dataset = create_dataset(self.name, root=self.root, split=split, download=True)
        except ImportError as error:
            missing = isinstance(error, ModuleNotFoundError) and error.name
            advice = f": pip install {error.name.partition('.')[0]}" if missing else ""
            raise UserError(f"data.name={self.name} needs a package that is not installed ({error}){advice}."
                            ) from error
        except Exception as error:  # whatever the library behind the name raises: a wrong name, split, root or network
            raise UserError(f"timm cannot open data.name={self.name}, split {split}, root {self.root}: "
                            f"{str(error) or type(error).__name__}.") from error
        reader = getattr(dataset, "reader", dataset)
        targets = _targets(reader)
        if not len(targets):
            raise UserError(f"data.name={self.name}, split {split}: no list of classes per image could be found in "
                            f"it.")
        numbers = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None) or {}
        ids = sorted(numbers, key=numbers.get) or [str(number) for number in range(int(targets.max()) + 1)]
        return TimmSet(dataset, targets, f"{self.name}/{split}", self.decoder), ids


def _targets(reader: object) -> np.ndarray:
    if hasattr(reader, "label_key"):  # Hugging Face: a column
        return np.asarray(reader.dataset[reader.label_key])
    if hasattr(reader, "targets"):
        return np.asarray(reader.targets)
    return np.asarray([target for _, target in getattr(reader, "samples", [])])


def _shards(path: Path, split: str) -> list[str]:
    found = [str(path)] if path.is_file() else _find_shards(path, split)
    if not found:
        raise UserError(f"data.root={path} has no tar files of the split {split} ({split}.tar, {split}/*.tar or "
                        f"*{split}*.tar).")
    return found


def _find_shards(folder: Path, split: str) -> list[str]:
    tars, folders = _tars_in(folder), class_folders(folder)
    for word in (split, *(WORDS if split in WORDS else ())):
        found = [tar for tar in tars if tar.stem == word] + (_tars_in(folder / word) if word in folders else [])
        if found := found or [tar for tar in tars if _has_word(tar.stem, word)]:
            return [str(tar) for tar in found]
    return []


def _tars_in(folder: Path) -> list[Path]:
    return sorted(Path(entry.path) for entry in entries(folder) if entry.name.endswith(".tar") and entry.name[0] != ".")


def _has_word(stem: str, word: str) -> bool:
    """`small-train-0001` has the word train, `constrained` does not."""
    return re.search(rf"(?<![a-zA-Z]){re.escape(word)}(?![a-zA-Z])", stem) is not None
