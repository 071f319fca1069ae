"""From the bytes of a picture file to RGB pixels, and a reason in words where that cannot be done.

Two decoders. `pil` is the field's reference. `torchvision` decodes JPEG with libjpeg-turbo into a uint8 tensor whose
memory is rows of RGB pixels, which ATen resizes without leaving uint8; what it refuses goes through PIL and is counted.
An EXIF orientation is not applied by either, as in timm and torchvision (published accuracies are measured so).
"""

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from deepvit.data import jpeg
from deepvit.data.jpeg import Frame
from deepvit.errors import UserError, did_you_mean

Picture = Image.Image | Tensor  # PIL RGB, or uint8 [3, H, W] over memory of [H, W, 3]

DECODERS = ("auto", "torchvision", "pil")
MAX_PIXELS = 89_478_485  # PIL's own limit for one picture: a quarter of a gigabyte at 24 bits
_BROKEN = (OSError, SyntaxError, ValueError, TypeError, EOFError, IndexError, KeyError, OverflowError,
           struct.error, zlib.error)  # seen from PIL's format plug-ins on damaged files


class BadPicture(Exception):
    """This picture cannot be used; the message is the reason, without the file's name."""


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
        return jpeg.pixels(bytearray(buffer.getvalue())).shape == (3, 8, 8)
    except (ImportError, RuntimeError, AttributeError):
        return False


def read_bytes(path: str | bytes) -> bytearray:
    """The content of a file; BadPicture where it cannot be read or is empty."""
    try:
        with open(path, "rb", buffering=0) as file:
            data = bytearray(file.readall())
    except OSError as error:
        raise BadPicture(f"the file cannot be read ({error.strerror})") from error
    if not data:
        raise BadPicture("the file is empty")
    return data


def decode(data: bytearray, decoder: str) -> tuple[Picture, bool]:
    """Bytes -> (picture, whether the fast decoder refused it). decoder: `torchvision` or `pil`.

    The picture is a PIL image with `pil` and a uint8 tensor [3, H, W] with `torchvision`, whatever decoded it.
    Raises BadPicture with the reason.
    """
    if decoder == "pil":
        return decode_pil(data), False
    if _plain(jpeg.frame_of(data)):
        try:
            return jpeg.pixels(data), False
        except RuntimeError:  # torchvision's only exception for a JPEG it refuses; PIL decides whether it is readable
            pass
    return to_tensor(decode_pil(data)), data[:2] == b"\xff\xd8"


@dataclass
class Undecoded:
    """A JPEG that becomes pixels once a crop tells which rows it wants."""

    data: bytearray
    frame: Frame
    on_refused: Callable[[], None]  # called where the fast decoder refused it and PIL read it

    @property
    def shape(self) -> tuple[int, int, int]:
        """As of the tensor: 3, H, W."""
        return 3, self.frame.height, self.frame.width

    def rows(self, end: int) -> Tensor:
        """uint8 [3, n, W], n >= end: the first `end` rows are those of `decode`, and so is a BadPicture."""
        try:
            return jpeg.top_pixels(self.data, self.frame, end)
        except RuntimeError:
            picture = to_tensor(decode_pil(self.data))
            self.on_refused()
            return picture


def undecoded(data: bytearray, decoder: str, on_refused: Callable[[], None]) -> Undecoded | None:
    """The picture in a file of which only some rows may be wanted; None where it has to be decoded whole."""
    frame = jpeg.frame_of(data) if decoder == "torchvision" else None
    return Undecoded(data, frame, on_refused) if _plain(frame) else None


def open_picture(path: str | Path, decoder: str = "pil") -> Picture:
    """One file -> RGB picture. Raises UserError that names the file and the reason."""
    try:
        return decode(read_bytes(str(path)), resolve_decoder(decoder))[0]
    except BadPicture as bad:
        raise UserError(f"{path} is not a usable picture: {bad}.") from bad


def decode_pil(data: bytes | bytearray) -> Image.Image:
    """Bytes -> PIL RGB image; BadPicture with the reason."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return _to_rgb(Image.open(io.BytesIO(data)))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as bomb:
        raise BadPicture(f"it claims more than {MAX_PIXELS:,} pixels (a decompression bomb?)") from bomb
    except Image.UnidentifiedImageError as error:
        raise BadPicture("the content is no known picture format") from error
    except _BROKEN as error:
        raise BadPicture(f"it is damaged ({str(error) or type(error).__name__})".replace("\n", " ")) from error


def to_tensor(image: Image.Image) -> Tensor:
    """PIL RGB -> uint8 [3, H, W] over memory of [H, W, 3]."""
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)


def to_pil(picture: Picture) -> Image.Image:
    """Either kind of picture as a PIL RGB image."""
    if isinstance(picture, Image.Image):
        return picture
    return Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise BadPicture("its pixels are floating-point numbers, whose range is unknown")
    if image.mode == "I" or image.mode.startswith("I;16"):  # PIL's own convert() would clip 16 bits at 255: all white
        pixels = np.asarray(image).astype(np.int64)
        image = Image.fromarray(np.clip(pixels >> _surplus_bits(image.mode, int(pixels.max())), 0, 255).astype(np.uint8))
    return image.convert("RGB")


def _surplus_bits(mode: str, largest: int) -> int:
    """Bits of grey beyond 8. A file of 16 bits may hold 12 (scanners, microscopes), which no header tells."""
    if mode == "I" and largest < 256:
        return 0
    return 4 if largest < 4096 else 8


def _plain(frame: Frame | None) -> bool:
    """Whether a JPEG has a size below the limit and one or three colour components (no CMYK)."""
    return frame is not None and 0 < frame.width * frame.height <= MAX_PIXELS and frame.components in (1, 3)
