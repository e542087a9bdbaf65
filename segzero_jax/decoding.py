"""Decoding images with Pillow: its errors and their messages, size limit, EXIF orientation, 16-bit PNGs."""

import re
import struct

from PIL import Image

# Pillow's errors on hostile or truncated files, those of its format plugins included.
UNDECODABLE = (
    *(OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, AssertionError),
    *(struct.error, Image.DecompressionBombError),
)
# The longest side that a JPEG can have. Some other formats allow more, but no real image has it, and scaling an image
# one pixel wide takes a row of the new width for each of its own rows.
MAX_SIDE = 65_500
_ORIENTATION = 0x0112
# The transposition that turns an image upright, by EXIF orientation (Exif 2.32, 4.6.4).
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BUFFER = re.compile(r" <_io\.BytesIO object at \w+>")


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, from 1 (upright) to 8; 5 to 8 exchange width and height. Any other value counts as upright.

    So does a TIFF: Pillow rotates it on loading and reports its upright size from the start. So does an image with
    damaged EXIF, which does not affect its pixels.
    """
    if image.format == "TIFF":
        return 1
    if image.format == "PNG":
        image.load()  # EXIF may follow the pixels; errors in these are not EXIF errors.
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except UNDECODABLE:
        return 1
    return found if found in _TURNS else 1


def upright(image: Image.Image) -> Image.Image:
    """The image as it is meant to be seen.

    Does not use Pillow's ``exif_transpose``, which rewrites the EXIF and fails on that of some cameras.
    """
    turn = _TURNS.get(orientation(image))
    return image if turn is None else image.transpose(turn)


def is_deep_png(data: bytes) -> bool:
    """Whether a PNG has 16 bits per channel, of which Pillow silently keeps eight (RFC 2083, 4.1.1)."""
    return data.startswith(b"\x89PNG") and data[24:25] == b"\x10"


def cause(error: BaseException) -> str:
    """The message of an error, in one line.

    Leaves out the address by which Pillow names a buffer, as it differs for every image and in every run.
    """
    return _BUFFER.sub("", " ".join(str(error).split()))
