"""Image files decoded to RGB pixels, or a readable reason why one cannot be. Of two decoders `pil` is the field's
reference, and `torchvision` decodes JPEG by libjpeg-turbo into a uint8 tensor, which ATen resizes as it is; what it
refuses goes through PIL and is counted. Neither applies an EXIF orientation (published accuracies are measured so)."""

import io
import struct
import warnings
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from deepvit.errors import UserError, choose

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # torchvision is moving its decoders
    decode_jpeg = ImageReadMode = None

AnyImage = Image.Image | Tensor  # PIL RGB, or uint8 [3, H, W] over memory of [H, W, 3]
_BROKEN = (OSError, SyntaxError, ValueError, TypeError, EOFError, LookupError, OverflowError, struct.error, zlib.error)


class BadImage(Exception):
    """This image cannot be used; the message is the reason, without the file's name."""


def resolve_decoder(decoder: str) -> str:
    """`auto` -> the decoder used on this machine, to be recorded with the run. Raises UserError for one it lacks."""
    known = ["pil"] if decode_jpeg is None else ["torchvision", "pil"]
    return choose("data.decoder", decoder, {"auto": known[0], **{name: name for name in known}})


def read_bytes(path: str | bytes, offset: int = 0, size: int = -1) -> bytearray:
    """`size` bytes of a file from `offset` on, or all; fewer where it is shorter; BadImage where it cannot be read."""
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            return bytearray(file.read(size))
    except OSError as error:
        raise BadImage(f"the file cannot be read ({error.strerror})") from error


def decode(data: bytearray, decoder: str) -> tuple[AnyImage, bool]:
    """Bytes -> (PIL image or uint8 tensor [3, H, W]; whether the fast decoder refused it). BadImage with the reason."""
    if not data:
        raise BadImage("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return _decode(data, decoder)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as bomb:
        raise BadImage(f"it claims more than {Image.MAX_IMAGE_PIXELS:,} pixels (a decompression bomb?)") from bomb
    except Image.UnidentifiedImageError as error:
        raise BadImage("the content is no known image format") from error
    except _BROKEN as error:  # seen from PIL's format plug-ins on damaged files
        raise BadImage(f"it is damaged ({str(error) or type(error).__name__})".replace("\n", " ")) from error


def _decode(data: bytearray, decoder: str) -> tuple[AnyImage, bool]:
    image = Image.open(io.BytesIO(data))  # reads the header alone
    if decoder == "pil":
        return _to_rgb(image), False
    is_jpeg = image.format in ("JPEG", "MPO")
    if is_jpeg and image.mode in ("RGB", "L"):  # no CMYK
        with suppress(RuntimeError):  # refuses this JPEG: PIL decides
            pixels = torch.frombuffer(data, dtype=torch.uint8)
            return decode_jpeg(pixels, mode=ImageReadMode.RGB), False  # [3, H, W] over memory of [H, W, 3]
    return pil_to_tensor(_to_rgb(image)), is_jpeg


def open_image(path: str | Path, decoder: str = "pil") -> AnyImage:
    """One file -> RGB image. Raises UserError that names the file and the reason."""
    try:
        return decode(read_bytes(str(path)), resolve_decoder(decoder))[0]
    except BadImage as bad:
        raise UserError(f"{path} is not a usable image: {bad}.") from bad


def as_array(image: AnyImage) -> np.ndarray:
    """Either kind of image as uint8 [H, W, 3]."""
    return np.asarray(image) if isinstance(image, Image.Image) else image.permute(1, 2, 0).numpy()


def to_pil(image: AnyImage) -> Image.Image:
    return image if isinstance(image, Image.Image) else Image.fromarray(as_array(image))


def as_image(pixels: np.ndarray, decoder: str) -> AnyImage:
    """uint8 [H, W, 3] as the kind of image that `decoder` makes, without a copy for tensors."""
    return Image.fromarray(pixels) if decoder == "pil" else torch.from_numpy(pixels).permute(2, 0, 1)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise BadImage("its pixels are floating-point numbers, whose range is unknown")
    if image.mode == "I" or image.mode.startswith("I;16"):  # PIL's own convert() would clip 16 bits at 255: all white
        pixels = np.asarray(image).astype(np.int64)
        # Bits of grey beyond 8: a 16-bit file may hold only 12 (scanners, microscopes), and no header records it.
        surplus = 0 if image.mode == "I" and pixels.max() < 256 else 4 if pixels.max() < 4096 else 8
        image = Image.fromarray(np.clip(pixels >> surplus, 0, 255).astype(np.uint8))
    return image.convert("RGB")
