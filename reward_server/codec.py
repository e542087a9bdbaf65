"""Encoding of images and masks in requests: checked before they are decoded, refused with a reason."""

import io
import struct
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from pycocotools import mask as coco

from reward_server import reward_pb2

MAX_IMAGE_BYTES = 16 * 2**20
MAX_IMAGE_PIXELS = 16_000_000
# The limit of JPEG. Resizing a taller image that is one pixel wide would take a row of SAM 2's width per pixel.
MAX_IMAGE_SIDE = 65_500
# A progressive JPEG has about ten scans. Each one goes over all pixels again, but takes as little as thirty bytes.
MAX_JPEG_SCANS = 100
# A mask with four million runs is noise, and decoding takes a hundred bytes per run.
MAX_MASK_BYTES = 4 * 2**20
_FORMATS = ("JPEG", "PNG", "WEBP")
# Errors that Pillow raises on damaged files, depending on the format and the place of the damage.
_DAMAGED = (
    *(OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, KeyError, AssertionError),
    *(struct.error, Image.DecompressionBombError),
)


class CodecError(ValueError):
    """The bytes are not an acceptable image or mask; the message is one line."""


def decode_image(data: bytes) -> np.ndarray:
    """Decodes a JPEG, PNG or WebP to uint8 RGB [height, width, 3].

    Size in bytes and pixels is checked before decoding. The image is taken as stored: an EXIF rotation is not applied,
    the alpha channel is dropped (its pixels keep their colours), grey becomes equal red, green and blue, of 16 bits the
    upper eight are kept, of an animation the first frame.

    Raises:
      CodecError: the image is too large, of another format, or damaged.
    """
    if len(data) > MAX_IMAGE_BYTES:
        raise CodecError(f"image: {len(data)} bytes, expected at most {MAX_IMAGE_BYTES}")
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as picture:
            size = f"{picture.width} x {picture.height} pixels"
            if picture.width * picture.height > MAX_IMAGE_PIXELS:
                raise CodecError(f"image: {size}, expected at most {MAX_IMAGE_PIXELS} in all")
            if max(picture.size) > MAX_IMAGE_SIDE:
                raise CodecError(f"image: {size}, expected at most {MAX_IMAGE_SIDE} a side")
            # In entropy-coded data 0xFF is followed by 0, so every match is a real start of scan.
            if picture.format == "JPEG" and (scans := data.count(b"\xff\xda")) > MAX_JPEG_SCANS:
                raise CodecError(f"image: a JPEG of {scans} scans, expected at most {MAX_JPEG_SCANS}")
            if picture.mode.startswith("I"):
                # 16-bit grey, which convert would clip at 255. For 16-bit colour Pillow keeps the upper 8 bits itself.
                grey = (np.asarray(picture) >> 8).clip(0, 255).astype(np.uint8)
                return np.repeat(grey[..., None], 3, 2)
            return np.array(picture.convert("RGB"))
    except CodecError:
        raise
    except UnidentifiedImageError:
        raise CodecError(f"image: not a whole JPEG, PNG or WebP ({len(data)} bytes): it begins like none") from None
    except _DAMAGED as error:
        reason = " ".join(str(error).split())
        raise CodecError(f"image: not a whole JPEG, PNG or WebP ({len(data)} bytes): {reason}") from None


def decode_mask(rle: reward_pb2.Rle, height: int, width: int) -> np.ndarray:
    """Decodes a mask that must have this size, to bool [height, width]. Raises CodecError.

    Does not use pycocotools, whose decoder trusts its input: malformed counts corrupt memory, and short ones leave the
    rest of the mask uninitialised.
    """
    if (rle.height, rle.width) != (height, width):
        raise CodecError(f"mask: {rle.width} x {rle.height} pixels, expected the image's {width} x {height}")
    # A number takes two characters only if a run is longer than fifteen pixels, and so on.
    if len(rle.counts) > 2 * (height * width + 2):
        raise CodecError(f"mask: {len(rle.counts)} characters of runs for {height * width} pixels")
    if len(rle.counts) > MAX_MASK_BYTES:
        raise CodecError(f"mask: {len(rle.counts)} characters of runs, expected at most {MAX_MASK_BYTES}")
    runs = _run_lengths(rle.counts.encode(), height * width)
    # Runs alternate between background and object, background first, in column-major order.
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def _run_lengths(counts: bytes, pixels: int) -> np.ndarray:
    """Reads COCO's compressed runs, which must fill ``pixels`` exactly.

    A number is written in groups of five bits, lowest first, each as a character from "0" on; the sixth bit means that
    more groups follow, the highest bit of the last group is the sign. From the fourth on, a run is stored as its
    difference from the run two before it (``rleToString`` in cocoapi's maskApi.c).
    """
    groups = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    last = np.flatnonzero(groups & 32 == 0)
    # No run that fits into an image needs more than six groups.
    sizes = np.diff(last, prepend=-1)
    if not groups.size or groups.min() < 0 or groups.max() > 63 or last.size == 0 or sizes.max() > 6:
        raise CodecError("mask: not COCO's compressed run lengths")
    if last[-1] != groups.size - 1:
        raise CodecError("mask: COCO's compressed run lengths, cut off within a number")
    first = last - sizes + 1
    places = np.arange(groups.size) - np.repeat(first, sizes)
    values = np.add.reduceat((groups & 31) << (5 * places), first)
    values -= np.where(groups[last] & 16, 1 << (5 * sizes), 0)
    # Differences from the run two before, in two interleaved chains; the first run is in neither.
    values[1::2] = values[1::2].cumsum()
    values[2::2] = values[2::2].cumsum()
    # A run longer than the image could make the sum overflow and wrap to the expected value.
    if values.min() < 0 or values.max() > pixels:
        raise CodecError("mask: not COCO's compressed run lengths")
    if values.sum() != pixels:
        raise CodecError(f"mask: runs for {values.sum()} pixels, expected {pixels}")
    return values


def pack_mask(mask: np.ndarray) -> np.ndarray:
    """Packs a bool [height, width] mask to one bit per pixel, uint8 [height, ceil(width / 8)]."""
    return np.packbits(mask, axis=-1)


def unpack_mask(packed: np.ndarray, width: int) -> np.ndarray:
    """The inverse of ``pack_mask``, as uint8 of 0 and 1."""
    return np.unpackbits(packed, axis=-1, count=width)


def encode_mask(mask: np.ndarray) -> reward_pb2.Rle:
    """Encodes a bool [height, width] mask."""
    rle: dict[str, Any] = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return reward_pb2.Rle(height=mask.shape[0], width=mask.shape[1], counts=rle["counts"].decode())
