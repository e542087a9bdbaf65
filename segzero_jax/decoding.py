"""Pictures that cannot be decoded: what Pillow raises, and what it says."""

import re
import struct

from PIL import Image

# On hostile or truncated files, from its format plugins up.
UNDECODABLE = (
    *(OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, AssertionError),
    *(struct.error, Image.DecompressionBombError),
)
# What a JPEG may have at the longest. Of other formats some may have more, as no picture does, and to scale one that is
# a pixel wide takes a row of the new width for each of its own.
MAX_SIDE = 65_500
_ORIENTATION = 0x0112
# What brings a picture upright, by its EXIF orientation (Exif 2.32, 4.6.4).
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
    """EXIF's, from 1 (upright) to 8; 5 to 8 exchange width and height. What is none of these counts as upright.

    So does a TIFF: Pillow turns it itself when it loads it, and has its size upright from the start. So does a picture
    whose EXIF is damaged, which says nothing of its pixels.
    """
    if image.format == "TIFF":
        return 1
    if image.format == "PNG":
        image.load()  # EXIF may stand behind the pixels, and what is wrong with those is no fault of its.
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except UNDECODABLE:
        return 1
    return found if found in _TURNS else 1


def upright(image: Image.Image) -> Image.Image:
    """The picture as it is meant to be seen.

    Not by Pillow's ``exif_transpose``: it writes the EXIF again, and some that cameras make it cannot write.
    """
    turn = _TURNS.get(orientation(image))
    return image if turn is None else image.transpose(turn)


def is_deep_png(data: bytes) -> bool:
    """Whether a PNG has 16 bits a channel, of which Pillow shows eight as if there were no more (RFC 2083, 4.1.1)."""
    return data.startswith(b"\x89PNG") and data[24:25] == b"\x10"


def cause(error: BaseException) -> str:
    """What an error says, in one line.

    Pillow names a buffer by its address, which is another one for every picture and in every run.
    """
    return _BUFFER.sub("", " ".join(str(error).split()))
