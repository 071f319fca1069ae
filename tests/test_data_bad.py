"""Images that are broken, strange or hostile: replaced by a rule and named in training, never in evaluation."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import deepvit.data as data
import deepvit.data.decode as decoding
from deepvit.data.decode import BadImage, decode
from deepvit.errors import UserError

DECODERS = ("pil", "torchvision")
GRAIN = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def claimed_png(width: int, height: int) -> bytes:
    """A PNG of some 100 bytes whose header promises width x height pixels."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def claimed_jpeg(width: int, height: int) -> bytes:
    """A JPEG whose frame header was changed to width x height."""
    content = bytearray(saved(GRAIN, "JPEG"))
    at = content.index(b"\xff\xc0") + 5
    content[at:at + 4] = struct.pack(">HH", height, width)
    return bytes(content)


BAD = {
    "truncated.jpg": saved(GRAIN, "JPEG")[:900], "truncated.png": saved(GRAIN, "PNG")[:900], "empty.jpg": b"",
    "text.jpg": b"not an image at all\n" * 50, "header_only.jpg": b"\xff\xd8\xff\xe0",
    "bomb.png": claimed_png(60_000, 60_000),
    "big.png": claimed_png(12_000, 9_000), "bomb.jpg": claimed_jpeg(65_000, 65_000),
    "float.tif": saved(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"),
}


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", BAD)
def test_each_has_a_reason_in_words(name, decoder, tmp_path):
    (tmp_path / name).write_bytes(BAD[name])
    with pytest.raises(UserError) as error:
        data.open_image(tmp_path / name, decoder)
    assert name in str(error.value) and "Traceback" not in str(error.value)
    expected = {"empty.jpg": "empty", "text.jpg": "no known image format", "float.tif": "floating-point"}
    assert expected.get(name, "bomb" if "bomb" in name or "big" in name else "") in str(error.value)


def strange() -> dict[str, tuple[bytes, np.ndarray | None]]:
    """Usable but unusual files, with the RGB pixels expected where they are known exactly."""
    grey16 = (np.arange(60 * 80, dtype=np.uint16) * 13).reshape(60, 80)
    palette = GRAIN.convert("P")
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees: not applied, as in timm and torchvision
    rgb = np.asarray(GRAIN)
    return {
        "cmyk.jpg": (saved(GRAIN.convert("CMYK"), "JPEG", quality=95), None),
        "progressive.jpg": (saved(GRAIN, "JPEG", progressive=True), None),
        "grey.jpg": (saved(GRAIN.convert("L"), "JPEG"), None),
        "rotated.jpg": (saved(GRAIN, "JPEG", exif=exif), None),
        "palette.png": (saved(palette, "PNG", transparency=bytes(range(256))), np.asarray(palette.convert("RGB"))),
        "alpha.png": (saved(GRAIN.convert("RGBA"), "PNG"), rgb),
        "grey16.png": (saved(Image.fromarray(grey16), "PNG"), np.repeat((grey16 >> 8)[..., None], 3, -1)),
        "grey_alpha.png": (saved(GRAIN.convert("LA"), "PNG"), np.asarray(GRAIN.convert("L").convert("RGB"))),
        "one_bit.png": (saved(GRAIN.convert("1"), "PNG"), np.asarray(GRAIN.convert("1").convert("RGB"))),
        "image.webp": (saved(GRAIN, "WEBP", lossless=True), rgb),
        "one_pixel.png": (saved(GRAIN.crop((0, 0, 1, 1)), "PNG"), rgb[:1, :1]),
        "wide.jpg": (saved(Image.new("RGB", (20_000, 12), (9, 9, 9)), "JPEG"), None),
    }


@pytest.mark.parametrize("name", strange())
def test_unusual_files_are_read_alike_by_both_decoders(name):
    content, expected = strange()[name]
    slow = np.asarray(decode(bytearray(content), "pil")[0])
    fast, refused = decode(bytearray(content), "torchvision")
    assert slow.ndim == 3 and fast.dtype == torch.uint8
    assert np.array_equal(fast.permute(1, 2, 0).numpy(), slow)
    assert refused == (name == "cmyk.jpg")
    if expected is not None:
        assert np.array_equal(slow, expected)
    for transform in (data.eval_transform(16), data.train_transform(16)):
        assert transform(fast)[0].shape == (3, 16, 16)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two classes of four; a/1.png and b/0.png are bad."""
    for number, name in enumerate("ab"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for at in range(4):
            Image.new("RGB", (9, 9), (40 * number + 10 * at,) * 3).save(tmp_path / "train" / name / f"{at}.png")
    (tmp_path / "train/a/1.png").write_bytes(BAD["truncated.png"])
    (tmp_path / "train/b/0.png").write_bytes(b"")
    (tmp_path / "val").symlink_to("train")
    return tmp_path


def train(folder, in_memory_mb=512, **options):
    images = data.load("folder", root=str(folder), in_memory_mb=in_memory_mb).train
    flat = data.train_transform(4, crop_scale=None, crop_pct=1.0, hflip=0, color_jitter=None)
    return [step[0] for step in data.train_batches(images, flat, **{"seed": 0, "batch_size": 4, "steps": 6, **options})]


@pytest.mark.parametrize("in_memory_mb", [0, 512])
def test_training_shows_the_next_one_and_says_so(folder, in_memory_mb):
    batches = train(folder, in_memory_mb)
    for index, replacement, value, target, name in ((1, 2, 20, 0, "a/1.png"), (4, 5, 50, 1, "b/0.png")):
        rows = [(batch, row) for batch in batches for row, at in enumerate(batch.indices.tolist()) if at == index]
        assert len(rows) == 3  # 24 samples of 8 images
        assert all(batch.images[row].unique().tolist() == [value] and batch.targets[row] == target
                   for batch, row in rows)
        told = [bad for batch in batches for bad in batch.bad if bad.index == index]
        assert len(told) == 3 and {bad.replaced_by for bad in told} == {replacement}
        assert told[0].name.endswith(name) and told[0].reason
    assert [bad for batch in train(folder, in_memory_mb, workers=2) for bad in batch.bad] == \
        [bad for batch in batches for bad in batch.bad]


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_stop_the_training(folder, workers):
    assert train(folder, max_bad=2, workers=workers)
    with pytest.raises(UserError, match=r"^2 images cannot be used, more than data.max_bad=1; the last is .*png: "):
        train(folder, max_bad=1, workers=workers)


def test_nothing_but_bad_images(folder):
    for file in (folder / "train").glob("*/*.png"):
        file.write_bytes(b"x")
    with pytest.raises(UserError, match="in a row cannot be used"):
        train(folder)


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_never_replaces(folder, workers):
    val = data.load("folder", root=str(folder)).val
    with pytest.raises(UserError, match=r"a/1.png is not a usable image: it is damaged.*data.on_error=report"):
        list(data.eval_batches(val, data.eval_transform(4), batch_size=3, workers=workers))
    batches = list(data.eval_batches(val, data.eval_transform(4), batch_size=3, workers=workers, on_error="report"))
    assert [bad.index for batch in batches for bad in batch.bad] == [1, 4]
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(8))
    assert all(bad.replaced_by is None for batch in batches for bad in batch.bad)
    assert batches[0].images[1].max() == 0 and batches[0].targets[1] == 0
    assert [len(part.bad) for part in batches[0].split(2)] == [1, 0]  # reported once


@pytest.mark.parametrize("in_memory_mb", [0, 512])
def test_what_the_fast_decoder_refuses_is_counted(tmp_path, in_memory_mb):
    for name in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "0.jpg").write_bytes(strange()["cmyk.jpg"][0])
        (tmp_path / name / "1.jpg").write_bytes(saved(GRAIN, "JPEG"))
    val = data.load("folder", root=str(tmp_path), in_memory_mb=in_memory_mb).val
    assert [batch.pil_fallbacks for batch in data.eval_batches(val, data.eval_transform(4), batch_size=2)] == [1, 1]


@pytest.mark.parametrize("decoder", DECODERS)
def test_garbage_is_a_bad_image_or_an_image(decoder):
    """900 mutated files: nothing but BadImage comes out."""
    rng, seeds = np.random.default_rng(1), [content for content, _ in strange().values() if len(content) < 40_000]
    refused = 0
    for turn in range(900):
        content = bytearray(seeds[turn % len(seeds)])
        for _ in range(rng.integers(1, 8)):
            content[rng.integers(len(content) // (4 if turn % 2 else 1))] = rng.integers(256)
        try:
            decode(content[:rng.integers(2, len(content))] if turn % 5 == 0 else content, decoder)
        except BadImage:
            refused += 1
    assert 100 < refused < 900


def test_a_torchvision_that_cannot_decode_is_not_said_to(monkeypatch):
    monkeypatch.setattr(decoding, "decode_jpeg", None)
    assert decoding.resolve_decoder("auto") == "pil"
    with pytest.raises(UserError, match="data.decoder=torchvision.*pil"):
        decoding.resolve_decoder("torchvision")
