"""Small folders of images for the tests of settings: in colour, not square, with no symmetry."""

import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from deepvit.data.source import write_list


def save_images(folder: Path, count: int, seed: int) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
        coarse.resize((28, 20), Image.BICUBIC).save(folder / f"{number}.png")


def make_data(root: Path) -> dict[str, Path]:
    """PHOTOS: 18 and 6 images of 3 classes; OTHER: of other classes; FLAT: not split; BAD: with one bad image in each
    split; TARS: 6, 4 and 8 images in train.tar, validation.tar and more.tar, the first of which is TAR; UNUSED: a list
    of one image of each split of PHOTOS."""
    found = {name: root / name.lower() for name in ("PHOTOS", "OTHER", "FLAT", "BAD", "TARS", "UNUSED")}
    for name, split, classes, count in (
            ("PHOTOS", "train", "a b c", 6), ("PHOTOS", "val", "a b c", 2), ("OTHER", "train", "one two", 3),
            ("OTHER", "val", "one two", 2), ("FLAT", ".", "a b", 4), ("BAD", "train", "a b", 6),
            ("BAD", "val", "a b", 2), ("TARS", "train", "a b", 3), ("TARS", "validation", "a b", 2),
            ("TARS", "more", "a b", 4)):
        for seed, one in enumerate(classes.split()):
            save_images(found[name] / split / one, count, seed)
    for split in ("train", "val"):
        (found["BAD"] / split / "a" / "0.png").write_bytes(b"no image")
    for split in ("train", "validation", "more"):
        with tarfile.open(found["TARS"] / f"{split}.tar", "w") as tar:
            for one in "ab":
                tar.add(found["TARS"] / split / one, arcname=one)
    unused = [(f"{found['PHOTOS']}/{split}/a/0.png", "blurred") for split in ("train", "val")]
    write_list(found["UNUSED"], unused, str(found["PHOTOS"]))
    return {**found, "TAR": found["TARS"] / "train.tar"}
