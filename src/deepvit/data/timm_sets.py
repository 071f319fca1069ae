"""timm's data sets by timm's names: Hugging Face's and torchvision's through timm, tar files by our own index."""

import re
from pathlib import Path

import numpy as np
from PIL import Image

from deepvit.data.decode import BadPicture, Picture, to_tensor
from deepvit.data.folders import class_folders, existing, readable_names
from deepvit.data.imageset import ImageSet, Splits, hold_out
from deepvit.data.listing import entries
from deepvit.data.shards import read_class_tars, read_webdataset
from deepvit.errors import UserError

STREAMS = ("hfids", "tfds")  # timm reads these front to back only
WORDS = {"train": ("train",), "validation": ("val", "validation", "test")}


class TimmSet(ImageSet):
    """A map-style data set made by timm.data.create_dataset; `rows` are places in it."""

    def __init__(self, dataset: object, targets: np.ndarray, label: str, decoder: str, rows: np.ndarray | None = None):
        self.dataset, self.label, self.decoder = dataset, label, decoder
        self.rows = np.arange(len(targets)) if rows is None else rows
        self.targets = targets.astype(np.int64)

    def name(self, index: int) -> str:
        row = int(self.rows[index])
        try:
            return f"{self.label}/{self.dataset.filename(row)}"
        except AttributeError:  # torchvision's data sets have no names
            return f"{self.label}/{row}"

    def picture(self, index: int) -> Picture:
        row = int(self.rows[index])
        reader = getattr(self.dataset, "reader", None)
        try:
            content = self.dataset[row][0] if reader is None else reader[row][0]
        except (OSError, ValueError, SyntaxError) as error:
            raise BadPicture(f"it is damaged ({error})") from error
        if isinstance(content, Image.Image):
            return content.convert("RGB") if self.decoder == "pil" else to_tensor(content.convert("RGB"))
        data = bytearray(content if isinstance(content, bytes) else content.read())
        if not data:
            raise BadPicture("the file is empty")
        return self._opened(data)

    def take(self, indices: np.ndarray) -> "TimmSet":
        return TimmSet(self.dataset, self.targets[indices], self.label, self.decoder, self.rows[indices])


def timm_splits(*, name: str | None, root: str | None, train_split: str, val_split: str, val_fraction: float | None,
                seed: int, decoder: str, **_: object) -> Splits:
    """`data=timm`. name: `hfds/...`, `torch/...`, `wds/...`, or empty for tar files with a folder or a tar per class.

    Tars are found as `root` itself, `root/<split>.tar`, `root/<split>/*.tar` or `root/*<split>*.tar`.
    """
    prefix = (name or "").partition("/")[0].lower()
    if prefix in STREAMS:
        raise UserError(f"data.name={name}: timm reads {prefix}/ data sets only front to back, so no picture can be "
                        "asked for by its number; use hfds/, torch/, or tar files.")
    if prefix in ("", "wds"):
        return _tar_splits(existing_tars(root), prefix == "wds", train_split, val_split, val_fraction, seed, decoder)
    train, ids = _create(name, root, train_split, decoder)
    if val_fraction:
        return hold_out(train, ids, val_fraction, seed, name)
    val, val_ids = _create(name, root, val_split, decoder)
    if val_ids != ids:
        raise UserError(f"data.name={name}: the splits {train_split} and {val_split} have different classes.")
    return Splits(train, val, readable_names(ids), ids)


def existing_tars(root: str | None) -> Path:
    """`root` as a tar file or a folder; UserError where it is neither."""
    path = Path(root or "").expanduser()
    return path if root and path.is_file() and path.suffix == ".tar" else existing(root, "timm")


def _tar_splits(path: Path, webdataset: bool, train_split: str, val_split: str, val_fraction: float | None, seed: int,
                decoder: str) -> Splits:
    train_tars = _shards(path, train_split)
    if webdataset:
        train, ids = read_webdataset(train_tars, decoder)
    else:
        train, ids = read_class_tars(train_tars, decoder)
    val_tars = [] if path.is_file() else _find_shards(path, val_split)
    unused = sorted({*val_tars} - {*train_tars})
    if val_fraction and unused:
        raise UserError(f"data.root={path} has {unused[0]}, which data.val_fraction={val_fraction} would not use: "
                        f"leave data.val_fraction out, or move it away.")
    if val_fraction:
        return hold_out(train, ids, val_fraction, seed, str(path))
    if path.is_file():
        raise UserError(f"{path} is a single tar: give data.val_fraction=0.1 to hold out a tenth of each class.")
    if len(unused) < len(val_tars):
        raise UserError(f"data.root={path}: the same tars are found for data.train_split={train_split} and "
                        f"data.val_split={val_split}, such as {train_tars[0]}: rename them after one split each.")
    val_tars = _shards(path, val_split)
    if not webdataset:
        return Splits(train, read_class_tars(val_tars, decoder, ids)[0], readable_names(ids), ids)
    val, val_ids = read_webdataset(val_tars, decoder)
    ids = max(ids, val_ids, key=len)
    return Splits(train, val, ids, ids)


def _shards(path: Path, split: str) -> list[str]:
    found = [str(path)] if path.is_file() else _find_shards(path, split)
    if not found:
        raise UserError(f"data.root={path} has no tar files of the split {split} ({split}.tar, {split}/*.tar or "
                        f"*{split}*.tar).")
    return found


def _find_shards(folder: Path, split: str) -> list[str]:
    tars, folders = _tars(folder), class_folders(folder)
    words = next((synonyms for synonyms in WORDS.values() if split in synonyms), (split,))
    for word in (split, *words):
        found = [tar for tar in tars if tar.stem == word] + (_tars(folder / word) if word in folders else [])
        found = found or [tar for tar in tars if _has_word(tar.stem, word)]
        if found:
            return [str(tar) for tar in found]
    return []


def _tars(folder: Path) -> list[Path]:
    return sorted(Path(entry.path) for entry in entries(folder) if entry.name.endswith(".tar") and entry.name[0] != ".")


def _has_word(stem: str, word: str) -> bool:
    """`small-train-0001` has the word train, `constrained` does not."""
    return re.search(rf"(?<![a-zA-Z]){re.escape(word)}(?![a-zA-Z])", stem) is not None


def _create(name: str, root: str | None, split: str, decoder: str) -> tuple[TimmSet, list[str]]:
    from timm.data import create_dataset
    try:
        dataset = create_dataset(name, root=root, split=split, download=True)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name
        advice = f": pip install {error.name.partition('.')[0]}" if missing else ""
        raise UserError(f"data.name={name} needs a package that is not installed ({error}){advice}.") from error
    except Exception as error:  # whatever the library behind the name raises: a wrong name, split, root or network
        raise UserError(f"timm cannot open data.name={name}, split {split}, root {root}: "
                        f"{str(error) or type(error).__name__}.") from error
    targets, ids = _targets(dataset), _class_ids(dataset)
    if targets is None or not len(targets):
        raise UserError(f"data.name={name}, split {split}: no list of classes per picture could be found in it.")
    ids = ids or [str(number) for number in range(int(targets.max()) + 1)]
    return TimmSet(dataset, targets, f"{name}/{split}", decoder), ids


def _targets(dataset: object) -> np.ndarray | None:
    reader = getattr(dataset, "reader", dataset)
    if hasattr(reader, "label_key"):  # Hugging Face: a column
        return np.asarray(reader.dataset[reader.label_key])
    if hasattr(reader, "targets"):
        return np.asarray(reader.targets)
    if hasattr(reader, "samples"):
        return np.asarray([target for _, target in reader.samples])
    return None


def _class_ids(dataset: object) -> list[str]:
    reader = getattr(dataset, "reader", dataset)
    numbers = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None) or {}
    return sorted(numbers, key=numbers.get)
