"""The stored form of images, which every reader decodes to the same pixels, and fingerprints to recognise them.

The policy and the segmenter decode an image on different machines with different code. So only images that leave a
decoder no choice are stored: PNG, JPEG or WebP, upright, 8 bits per channel, grey or RGB, no transparency. Such a file
is stored unchanged; any other is re-encoded.
"""

import hashlib
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from segzero_jax.data.unusable import Unusable
from segzero_jax.decoding import MAX_SIDE, UNDECODABLE, cause, is_deep_png, orientation, upright
from segzero_jax.types import Frame

# Limits of the reward server; larger images are scaled down, with their masks.
MAX_BYTES = 16 * 2**20
MAX_PIXELS = 16_000_000
# Nothing larger is decoded: an image must fit into memory many times over.
_MAX_DECODED = 200_000_000
_STORED = ("PNG", "JPEG", "WEBP")
_SIDEWAYS = (5, 6, 7, 8)  # Orientations that exchange width and height; 2, 3 and 4 keep them.
_SIDE = 16


class PictureError(Unusable):
    """The image cannot be stored; the message is one line."""


@dataclass(frozen=True)
class Picture:
    """An image ready to be stored.

    Attributes:
      data: the encoded file.
      frame: the image size.
      original: the size before scaling down; usually the same.
      sha256: SHA-256 of the file in the source.
      fingerprint: see ``fingerprint``.
    """

    data: bytes
    frame: Frame
    original: Frame
    sha256: str
    fingerprint: bytes


def read_picture(data: bytes, annotated: Frame | None, as_in_file: bool = False) -> Picture:
    """Checks an image and converts it to the stored form.

    Args:
      data: the file in the source.
      annotated: the image size that annotations refer to; None if they are in pixels of the upright image. An image
        with an EXIF rotation is turned upright, unless this size shows that they were made on the unrotated pixels.
      as_in_file: annotations of the file's size were made on its unrotated pixels, even if the size cannot tell: EXIF
        mirrors the image or rotates it by 180 degrees, or the image is square.

    Raises:
      PictureError: the image is damaged, differs from the annotated size, cannot be converted, or is too large to
        decode.
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
    """Encodes RGB pixels: as a JPEG if ``lossy`` or if a PNG is too large for a server, else as a PNG."""
    file = io.BytesIO()
    if not lossy:
        pixels.save(file, "PNG")
    if lossy or file.tell() > MAX_BYTES:
        file = io.BytesIO()
        pixels.save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()


def _rgb(image: Image.Image) -> Image.Image:
    """Converts to 8-bit RGB: of 16 bits the upper eight are kept, transparency becomes white.

    Raises PictureError for floating-point pixels, whose range is unknown.
    """
    if image.mode == "F":
        kind = "picture of floating-point numbers"
        raise PictureError(kind, f"{kind}, expected 8 or 16 bits a channel")
    image.load()
    if image.mode.startswith("I"):
        grey = np.asarray(image)
        # For 16-bit files; wider ones have no known white point.
        return Image.fromarray((grey.clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        layered = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layered.size, (255, 255, 255, 255)), layered).convert("RGB")
    rgb = image.convert("RGB")
    rgb.info.clear()  # Colour profiles and EXIF no longer apply to these pixels.
    return rgb


def fingerprint(image: Image.Image) -> bytes:
    """A perceptual hash of 256 bits that survives scaling, squashing and recompression.

    The image is averaged to 17 x 16 grey cells; a bit is set if a cell is darker than the one on its right.
    """
    if image.format == "JPEG":
        # Decodes at an eighth of the size, but still reads the whole file.
        image.draft("L", (8 * _SIDE, 8 * _SIDE))
    small = image.convert("L").resize((_SIDE + 1, _SIDE), Image.Resampling.BOX)
    grey = np.asarray(small, np.int16)
    return np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes()


def fit_mask(mask: np.ndarray, frame: Frame) -> np.ndarray:
    """A bool [H, W] mask at the size of its stored image; resized only if the image was scaled down."""
    if mask.shape == (frame.height, frame.width):
        return mask
    return np.asarray(Image.fromarray(mask).resize((frame.width, frame.height), Image.Resampling.NEAREST))


def upright_size(data: bytes) -> Frame:
    """The size of an image after its EXIF rotation, without decoding it. Raises PictureError."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            turned = orientation(image) in _SIDEWAYS
            return Frame(image.height, image.width) if turned else Frame(image.width, image.height)
    except UNDECODABLE as error:
        raise _unreadable(error) from None


def _unreadable(error: BaseException) -> PictureError:
    kind = "picture cannot be read"
    return PictureError(kind, f"{kind} ({cause(error)})")
