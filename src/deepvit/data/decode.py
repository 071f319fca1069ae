"""From the bytes of an image file to RGB pixels, and a reason in words where that cannot be done.

Two decoders. `pil` is the field's reference. `torchvision` decodes JPEG with libjpeg-turbo into a uint8 tensor whose
memory is rows of RGB pixels, which ATen resizes without leaving uint8; what it refuses goes through PIL and is counted.
An EXIF orientation is not applied by either, as in timm and torchvision (published accuracies are measured so).
"""

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from deepvit.errors import UserError, did_you_mean

AnyImage = Image.Image | Tensor  # PIL RGB, or uint8 [3, H, W] over memory of [H, W, 3]

DECODERS = ("auto", "torchvision", "pil")
MAX_PIXELS = 89_478_485  # PIL's own limit for one image: a quarter of a gigabyte at 24 bits
_BROKEN = (OSError, SyntaxError, ValueError, TypeError, EOFError, IndexError, KeyError, OverflowError,
           struct.error, zlib.error)  # seen from PIL's format plug-ins on damaged files


class BadImage(Exception):
    """This image cannot be used; the message is the reason, without the file's name."""


def resolve_decoder(decoder: str) -> str:
    """`auto` -> the decoder used on this machine (`torchvision` or `pil`), to be recorded with the run.

    Raises UserError for an unknown name, or where `torchvision` is asked for and this build cannot decode JPEG.
    """
    if decoder not in DECODERS:
        raise UserError(f"data.decoder={decoder} is none of {', '.join(DECODERS)}.{did_you_mean(decoder, DECODERS)}")
    if decoder == "pil":
        return "pil"
    available = _torchvision_decodes()
    if decoder == "torchvision" and not available:
        raise UserError("data.decoder=torchvision: this build of torchvision cannot decode JPEG; use data.decoder=pil.")
    return "torchvision" if available else "pil"


def _torchvision_decodes() -> bool:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    try:
        return _jpeg_pixels(bytearray(buffer.getvalue())).shape == (3, 8, 8)
    except (ImportError, RuntimeError, AttributeError):
        return False


def read_bytes(path: str | bytes) -> bytearray:
    """The content of a file; BadImage where it cannot be read or is empty."""
    try:
        with open(path, "rb", buffering=0) as file:
            data = bytearray(file.readall())
    except OSError as error:
        raise BadImage(f"the file cannot be read ({error.strerror})") from error
    if not data:
        raise BadImage("the file is empty")
    return data


def decode(data: bytearray, decoder: str) -> tuple[AnyImage, bool]:
    """Bytes -> (image, whether the fast decoder refused it). decoder: `torchvision` or `pil`.

    The image is a PIL image with `pil` and a uint8 tensor [3, H, W] with `torchvision`, whatever decoded it.
    Raises BadImage with the reason.
    """
    with _reasons():
        image = Image.open(io.BytesIO(data))  # reads the header alone
        if decoder == "pil":
            return _to_rgb(image), False
        is_jpeg = image.format in ("JPEG", "MPO")
        if is_jpeg and image.mode in ("RGB", "L"):  # no CMYK
            try:
                return _jpeg_pixels(data), False
            except RuntimeError:  # torchvision's only exception for a JPEG it refuses; PIL decides
                pass
        return to_tensor(_to_rgb(image)), is_jpeg


def _jpeg_pixels(data: bytearray) -> Tensor:
    """-> uint8 [3, H, W] over memory of [H, W, 3], by libjpeg-turbo. RuntimeError for what torchvision refuses."""
    from torchvision.io import ImageReadMode, decode_jpeg
    return decode_jpeg(torch.frombuffer(data, dtype=torch.uint8), mode=ImageReadMode.RGB)


@contextmanager
def _reasons() -> Iterator[None]:
    """What PIL raises for a file, as BadImage with the reason."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as bomb:
        raise BadImage(f"it claims more than {MAX_PIXELS:,} pixels (a decompression bomb?)") from bomb
    except Image.UnidentifiedImageError as error:
        raise BadImage("the content is no known image format") from error
    except _BROKEN as error:
        raise BadImage(f"it is damaged ({str(error) or type(error).__name__})".replace("\n", " ")) from error


def open_image(path: str | Path, decoder: str = "pil") -> AnyImage:
    """One file -> RGB image. Raises UserError that names the file and the reason."""
    try:
        return decode(read_bytes(str(path)), resolve_decoder(decoder))[0]
    except BadImage as bad:
        raise UserError(f"{path} is not a usable image: {bad}.") from bad


def to_tensor(image: Image.Image) -> Tensor:
    """PIL RGB -> uint8 [3, H, W] over memory of [H, W, 3]."""
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)


def as_array(image: AnyImage) -> np.ndarray:
    """Either kind of image as uint8 [H, W, 3]."""
    return np.asarray(image) if isinstance(image, Image.Image) else image.permute(1, 2, 0).numpy()


def as_image(pixels: np.ndarray, decoder: str) -> AnyImage:
    """uint8 [H, W, 3] as the kind of image that `decoder` makes, without a copy for tensors."""
    return Image.fromarray(pixels) if decoder == "pil" else torch.from_numpy(pixels).permute(2, 0, 1)


def to_pil(image: AnyImage) -> Image.Image:
    """Either kind of image as a PIL RGB image."""
    return image if isinstance(image, Image.Image) else Image.fromarray(np.ascontiguousarray(as_array(image)))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise BadImage("its pixels are floating-point numbers, whose range is unknown")
    if image.mode == "I" or image.mode.startswith("I;16"):  # PIL's own convert() would clip 16 bits at 255: all white
        pixels = np.asarray(image).astype(np.int64)
        # Bits of grey beyond 8: a file of 16 may hold 12 (scanners, microscopes), which no header tells.
        surplus = 0 if image.mode == "I" and pixels.max() < 256 else 4 if pixels.max() < 4096 else 8
        image = Image.fromarray(np.clip(pixels >> surplus, 0, 255).astype(np.uint8))
    return image.convert("RGB")
