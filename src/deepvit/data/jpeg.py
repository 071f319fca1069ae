"""JPEG by torchvision's libjpeg-turbo, whole or down to the last row that is wanted."""

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

_START_OF_FRAME = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # markers that carry width and height
_SEQUENTIAL = (0xC0, 0xC1)  # Huffman coded, top to bottom; a progressive file's scans would all have to be read anyway
CONTEXT = 2  # rows below the last wanted that libjpeg looks at where it interpolates colour of half the height


class Frame(NamedTuple):
    """What a JPEG's header tells of the picture."""

    marker: int  # second byte of the start-of-frame marker
    at: int  # of that marker in the file, bytes
    height: int
    width: int
    components: int


def frame_of(data: bytearray) -> Frame | None:
    """The frame header of a JPEG file; None where there is none."""
    at = 2
    while data[:2] == b"\xff\xd8" and at + 10 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif marker in _START_OF_FRAME:
            return Frame(marker, at, *struct.unpack_from(">HHB", data, at + 5))
        else:
            at += 2 + struct.unpack_from(">H", data, at + 2)[0]
    return None


def pixels(data: bytearray) -> Tensor:
    """-> uint8 [3, H, W] over memory of [H, W, 3]. RuntimeError for what torchvision refuses."""
    from torchvision.io import ImageReadMode, decode_jpeg
    return decode_jpeg(torch.frombuffer(data, dtype=torch.uint8), mode=ImageReadMode.RGB)


def top_pixels(data: bytearray, frame: Frame, end: int) -> Tensor:
    """As `pixels`, but only rows [0, n) of it with n >= end, the first `end` of them equal bit for bit.

    The height in a copy of the header is lowered, so libjpeg decodes no row below. It still looks through the rest of
    the file for markers up to its end, so a file cut short below the rows wanted is refused as by `pixels`. For a
    process without threads that write messages: libjpeg's word about the bytes it passed over is kept off the terminal.
    """
    height = end + CONTEXT
    if frame.marker not in _SEQUENTIAL or height >= frame.height:
        return pixels(data)
    lowered = data.copy()
    struct.pack_into(">H", lowered, frame.at + 5, height)
    try:
        with _no_messages():
            return pixels(lowered)
    except RuntimeError:  # what is wrong with the file is for the whole of it to show
        return pixels(data)


@contextmanager
def _no_messages() -> Iterator[None]:
    """The error stream of C code (file descriptor 2) goes nowhere."""
    nowhere, stream = _streams()
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stream, 2)


@cache
def _streams() -> tuple[int, int]:
    return os.open(os.devnull, os.O_WRONLY), os.dup(2)
