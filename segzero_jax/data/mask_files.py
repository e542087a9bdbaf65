"""Reads masks from image files."""

import io

import numpy as np
from PIL import Image

from segzero_jax.data.unusable import Unusable
from segzero_jax.decoding import UNDECODABLE, cause, is_deep_png

_LOSSY = ("JPEG", "MPO", "AVIF")


class MaskError(Unusable):
    """The file is not a usable mask; the message is one line."""


def read_mask(data: bytes, name: str) -> np.ndarray:
    """Reads a mask from an image, bool [H, W]: True where any channel is above 0 and the pixel is not transparent.

    Args:
      name: name of the file, for messages.

    Raises MaskError for data that is not an image, and for lossy formats, whose artefacts around an object are above 0.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if (
                image.format in _LOSSY
                or (image.format == "WEBP" and _is_lossy_webp(data))
                or image.info.get("compression") == "jpeg"  # in a TIFF
            ):
                kind = "a mask in a lossy format"
                raise MaskError(kind, f"{kind}, expected PNG: {name} is {image.format}")
            if image.mode == "CMYK":  # Ink is the inverse of colour.
                raise MaskError("a mask in inks", f"a mask in inks, expected PNG: {name} is CMYK")
            if image.mode == "P":
                return _numbered(image, name)
            if is_deep_png(data) and not image.mode.startswith("I"):  # Pillow keeps the upper byte only, without ids.
                kind = "a mask of 16 bits a colour"
                raise MaskError(kind, f"{kind}, expected 8 bits, or grey: {name}")
            # A PNG may declare one colour transparent.
            holed = "transparency" in image.info and image.mode in ("1", "L", "RGB")
            pixels = np.asarray(image.convert("RGBA") if "A" in image.getbands() or holed else image)
    except UNDECODABLE as error:
        if isinstance(error, MaskError):
            raise
        kind = "a mask cannot be read"
        raise MaskError(kind, f"{kind} ({cause(error)}), in {name}") from None
    if pixels.ndim == 2:
        return pixels > 0
    seen = (pixels[..., :3] > 0).max(axis=-1)
    return seen & (pixels[..., 3] > 0) if pixels.shape[-1] == 4 else seen


def _numbered(image: Image.Image, name: str) -> np.ndarray:
    """A mask from the palette indices, not the colours: index 0 is the background.

    Raises MaskError if another index is black and 0 is not: programs that write a palette of black and white number its
    colours in any order.
    """
    numbers = np.asarray(image)
    colours = np.array(image.getpalette("RGB") or [], np.uint8).reshape(-1, 3)
    black = np.flatnonzero(~colours.any(axis=1))
    if 0 not in black and np.isin(numbers, black).any():
        kind = "a mask in a palette whose 0 is not black"
        raise MaskError(kind, f"{kind} while another number is, expected grey: {name}")
    return numbers > 0


def _is_lossy_webp(data: bytes) -> bool:
    """Whether the image, or the first frame of an animation, is in a "VP8 " chunk; "VP8L" is lossless (RFC 9649)."""
    chunk = 12
    while chunk + 8 <= len(data):
        kind = data[chunk : chunk + 4]
        if kind in (b"VP8 ", b"VP8L"):
            return kind == b"VP8 "
        size = int.from_bytes(data[chunk + 4 : chunk + 8], "little")
        # An animation frame has a header of 16 bytes before its chunks.
        chunk += 8 + 16 if kind == b"ANMF" else 8 + size + size % 2
    return False
