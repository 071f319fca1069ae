"""A JPEG decoded down to a crop's lower edge: the same pixels, the same refusals, nothing on the terminal."""

import io
import struct

import numpy as np
import pytest
import torch
from PIL import Image

import deepvit.data as data
from deepvit.data.decode import BadPicture, Undecoded, decode, undecoded
from deepvit.data.randomness import generators_kept, seed_sample

RNG = np.random.default_rng(0)
COARSE = Image.fromarray(RNG.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((141, 203), Image.BICUBIC)
PHOTO = Image.fromarray(np.clip(np.asarray(COARSE) + RNG.normal(0, 9, (203, 141, 3)), 0, 255).astype(np.uint8))


def jpeg(image: Image.Image, **options) -> bytearray:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **{"quality": 88, **options})
    return bytearray(buffer.getvalue())


def multi_scan(factor: int) -> bytearray:
    """A sequential file with a scan for each colour, put together from three grey ones; chroma sides / factor."""
    planes = [plane if at == 0 else plane.resize([-(-side // factor) for side in PHOTO.size])
              for at, plane in enumerate(PHOTO.convert("YCbCr").split())]
    files = [jpeg(plane) for plane in planes]
    frame, scan = files[0].index(b"\xff\xc0"), files[0].index(b"\xff\xda")
    tables = files[0][files[0].index(b"\xff\xc4"):scan]
    kinds = bytes(value for at in range(3) for value in (at + 1, (0x11, 0x11 * factor)[at == 0], 0))
    header = files[0][:frame] + struct.pack(">HHBHHB", 0xFFC0, 17, 8, *PHOTO.size[::-1], 3) + kinds + tables
    scans = [b"\xff\xda\0\x08\x01" + bytes([at + 1]) + b"\0\0\x3f\0" + file[file.index(b"\xff\xda") + 10:-2]
             for at, file in enumerate(files)]
    return header + b"".join(scans) + b"\xff\xd9"


KINDS = {
    "4:4:4": jpeg(PHOTO, subsampling=0), "4:2:2": jpeg(PHOTO, subsampling=1), "4:2:0": jpeg(PHOTO, subsampling=2),
    "grey": jpeg(PHOTO.convert("L")), "progressive": jpeg(PHOTO, progressive=True),
    "restart rows": jpeg(PHOTO, restart_marker_rows=1), "restart blocks": jpeg(PHOTO, restart_marker_blocks=5),
    "even sides": jpeg(PHOTO.resize((128, 192)), subsampling=2), "thin": jpeg(PHOTO.resize((3, 200)), subsampling=2),
    "tall samples": jpeg(PHOTO.transpose(Image.Transpose.ROTATE_90), subsampling=1, optimize=True),
    "thumbnail": jpeg(PHOTO, exif=b"Exif\0\0" + bytes(jpeg(PHOTO.resize((16, 16))))),
    "scans 4:4:4": multi_scan(1), "scans 4:2:0": multi_scan(2),
}


def opened(content: bytearray, refused: list | None = None) -> Undecoded:
    return undecoded(content, "torchvision", lambda: (refused if refused is not None else []).append(1))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_equal_those_of_the_whole_picture(kind, capfd):
    content = KINDS[kind]
    whole, _ = decode(content, "torchvision")
    copy = bytes(content)
    for end in range(1, whole.shape[1] + 1):
        top = opened(content).rows(end)
        assert torch.equal(top[:, :end], whole[:, :end])
        assert kind == "progressive" or top.shape[1] <= end + 2
    assert content == copy and capfd.readouterr().err == ""


@pytest.mark.parametrize("kind", KINDS)
def test_transforms_make_the_same_of_both(kind):
    content = KINDS[kind]
    whole, _ = decode(content, "torchvision")
    for transform in (data.train_transform(32, random_erasing=0.5), data.eval_transform(32)):
        with generators_kept():
            for seed in range(40):
                made = []
                for picture in (whole, opened(content)):
                    seed_sample(0, 0, seed, 0)
                    made.append(transform(picture))
                (pixels, erased), (other_pixels, also_erased) = made
                assert torch.equal(pixels, other_pixels)
                assert [patch[:2] for patch in erased] == [patch[:2] for patch in also_erased]
                assert all(torch.equal(one[2], other[2]) for one, other in zip(erased, also_erased))


def outcome(content: bytearray, end: int | None) -> tuple[str, torch.Tensor | None]:
    """(what became of it, its pixels)."""
    refused = []
    try:
        if end is None:
            picture, was_refused = decode(content, "torchvision")
            return "refused" if was_refused else "decoded", picture
        picture = opened(content, refused).rows(end)
        return "refused" if refused else "decoded", picture
    except BadPicture as bad:
        return str(bad), None


@pytest.mark.parametrize("kind", KINDS)
def test_damage_below_the_crop_counts_as_without_it(kind):
    """Files cut short and files with bytes changed: whether a picture is bad does not depend on the crop."""
    rng, bad = np.random.default_rng(1), 0
    for turn in range(60):
        content = KINDS[kind].copy()
        for _ in range(0 if turn % 3 == 0 else rng.integers(1, 6)):
            value = rng.choice([0, 0xFF, 0xD9, 0xC4, rng.integers(256)])
            content[rng.integers(len(content) // 4, len(content))] = value
        content = content[:rng.integers(len(content) // 2, len(content))] if turn % 2 else content
        if opened(content) is None:
            continue
        expected, whole = outcome(content, None)
        bad += whole is None
        for end in rng.integers(1, opened(content).shape[1] + 1, size=3).tolist():
            found, top = outcome(content, end)
            assert found == expected
            assert whole is None or torch.equal(top[:, :end], whole[:, :end])
    assert 10 < bad < 60


def test_workers_make_the_batches_of_the_main_process(tmp_path, capfd):
    """With a file cut in its last tenth, which is replaced in any epoch, and one that only PIL reads."""
    for split in ("train", "val"):
        for number, (kind, content) in enumerate(KINDS.items()):
            place = tmp_path / split / "ab"[number % 2] / f"{number}.jpg"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content[:-len(content) // 10] if kind == "4:2:2" else content)
        (tmp_path / split / "a" / "cmyk.jpg").write_bytes(jpeg(PHOTO.convert("CMYK")))
    splits = data.load("folder", root=str(tmp_path), in_memory_mb=0, decoder="torchvision")
    made = [[*data.train_batches(splits.train, data.train_transform(24), seed=3, batch_size=7, steps=8,
                                 workers=workers)] for workers in (0, 2)]
    for (one,), (other,) in zip(*made, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.targets, other.targets)
        assert (one.bad, one.refused) == (other.bad, other.refused)
    assert sum(one.refused for one, in made[0]) == 4 and sum(len(one.bad) for one, in made[0]) == 4
    assert "Corrupt JPEG" not in capfd.readouterr().err
