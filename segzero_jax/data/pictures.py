"""Pictures as they are stored: what every reader decodes to the same pixels, and what tells one picture from another.

The policy and the segmenter decode a picture on different machines with different code. Stored are only pictures on
which no decoder has a choice: PNG, JPEG or WebP, upright, 8 bits a channel, grey or RGB, no transparency. Such a file
is stored as it is; any other is written again.
"""

import hashlib
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from segzero_jax.data.unusable import Unusable
from segzero_jax.decoding import MAX_SIDE, UNDECODABLE, cause, is_deep_png, orientation, upright
from segzero_jax.types import Frame

# A reward server takes no larger ones; larger pictures are scaled down, with their masks.
MAX_BYTES = 16 * 2**20
MAX_PIXELS = 16_000_000
# Nor is anything decoded that would not fit into memory many times over.
_MAX_DECODED = 200_000_000
_STORED = ("PNG", "JPEG", "WEBP")
_SIDEWAYS = (5, 6, 7, 8)  # Orientations that exchange width and height; 2, 3 and 4 keep them.
_SIDE = 16


class PictureError(Unusable):
    """A picture that cannot be stored; one line."""


@dataclass(frozen=True)
class Picture:
    """A picture ready to be stored.

    Attributes:
      data: its file.
      frame: its size.
      original: its size before it was scaled down; the same for most.
      sha256: of the file in the source.
      fingerprint: see ``fingerprint``.
    """

    data: bytes
    frame: Frame
    original: Frame
    sha256: str
    fingerprint: bytes


def read_picture(data: bytes, annotated: Frame | None, as_in_file: bool = False) -> Picture:
    """Checks a picture and brings it into the stored form.

    Args:
      data: the file in the source.
      annotated: the size that annotations speak of; None where they are in the pixels of the upright picture. A picture
        with an EXIF rotation is turned upright, unless this size says that they were made on the unturned pixels.
      as_in_file: annotations of the file's size were made on its unturned pixels, also where no size tells: EXIF
        mirrors the picture or turns it over, or it is square.

    Raises:
      PictureError: damaged, of another size than annotated, or too large to decode.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data))
        if image.width * image.height > _MAX_DECODED or max(image.size) > MAX_SIDE:
            raise PictureError(
                "picture of too many pixels",
                f"picture of {image.width}x{image.height} pixels, expected at most {_MAX_DECODED}, {MAX_SIDE} a side",
            )
        turn = orientation(image)
        plain = image.format in _STORED and image.mode in ("RGB", "L") and "transparency" not in image.info
        plain = plain and not is_deep_png(data)
        size = Frame(image.width, image.height)
        told_by_size = turn in _SIDEWAYS and size.width != size.height
        unturned = annotated == size and (as_in_file or told_by_size)
        original = size if unturned else upright_size(data)
        if annotated is not None and original != annotated:
            raise PictureError(
                "picture of another size than annotated",
                f"picture of {original.width}x{original.height} pixels, "
                f"expected the annotated {annotated.width}x{annotated.height}",
            )
        stored = data
        if not plain or turn != 1 or getattr(image, "n_frames", 1) > 1 or _too_large(image, data):
            image, stored = _written_again(image if unturned else upright(image), image.format)
        frame = Frame(image.width, image.height)
        return Picture(stored, frame, original, hashlib.sha256(data).hexdigest(), fingerprint(image))
    except UNDECODABLE as error:
        if isinstance(error, PictureError):
            raise
        raise _unreadable(error) from None


def _too_large(image: Image.Image, data: bytes) -> bool:
    return image.width * image.height > MAX_PIXELS or len(data) > MAX_BYTES


def _written_again(image: Image.Image, source_format: str | None) -> tuple[Image.Image, bytes]:
    lossy = source_format in ("JPEG", "WEBP") and image.mode in ("RGB", "L", "CMYK")
    pixels = _rgb(image)
    if pixels.width * pixels.height > MAX_PIXELS:
        shrink = (MAX_PIXELS / (pixels.width * pixels.height)) ** 0.5
        pixels = pixels.resize((int(pixels.width * shrink), int(pixels.height * shrink)), Image.Resampling.LANCZOS)
    return pixels, written(pixels, lossy)


def written(pixels: Image.Image, lossy: bool) -> bytes:
    """RGB pixels as a file: a PNG where that is small enough for a server; a JPEG otherwise, and where ``lossy``."""
    file = io.BytesIO()
    if not lossy:
        pixels.save(file, "PNG")
    if lossy or file.tell() > MAX_BYTES:
        file = io.BytesIO()
        pixels.save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()


def _rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB: 16 bits keep the upper eight, what is transparent is white.

    Raises PictureError for numbers that are not whole, of which nothing says how bright they are.
    """
    if image.mode == "F":
        kind = "picture of floating-point numbers"
        raise PictureError(kind, f"{kind}, expected 8 or 16 bits a channel")
    image.load()
    if image.mode.startswith("I"):
        grey = np.asarray(image)
        # Of 16-bit files; wider ones have no white point to go by.
        return Image.fromarray((grey.clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        layered = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layered.size, (255, 255, 255, 255)), layered).convert("RGB")
    rgb = image.convert("RGB")
    rgb.info.clear()  # Colour profiles and EXIF speak of other pixels.
    return rgb


def fingerprint(image: Image.Image) -> bytes:
    """What a picture looks like, 256 bits that survive scaling, squashing and recompression.

    The picture is averaged to 17 x 16 grey cells; a bit says whether a cell is darker than the one on its right.
    """
    if image.format == "JPEG":
        # Decodes an eighth of the size, and still all of the file.
        image.draft("L", (8 * _SIDE, 8 * _SIDE))
    small = image.convert("L").resize((_SIDE + 1, _SIDE), Image.Resampling.BOX)
    grey = np.asarray(small, np.int16)
    return np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes()


def fit_mask(mask: np.ndarray, frame: Frame) -> np.ndarray:
    """A bool [H, W] mask in the size of its stored picture; another only where that was scaled down."""
    if mask.shape == (frame.height, frame.width):
        return mask
    return np.asarray(Image.fromarray(mask).resize((frame.width, frame.height), Image.Resampling.NEAREST))


def upright_size(data: bytes) -> Frame:
    """The size of a picture after its EXIF rotation, without decoding it. Raises PictureError."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            turned = orientation(image) in _SIDEWAYS
            return Frame(image.height, image.width) if turned else Frame(image.width, image.height)
    except UNDECODABLE as error:
        raise _unreadable(error) from None


def _unreadable(error: BaseException) -> PictureError:
    kind = "picture cannot be read"
    return PictureError(kind, f"{kind} ({cause(error)})")
