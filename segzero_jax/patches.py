"""Turns an image into the patches that the vision tower reads.

Same pixels and windows as Hugging Face's (transformers 5.23: ``Qwen2VLImageProcessorPil`` and
``get_vision_window_index``). Only the layout differs: patches are stored in window order, in runs the size of a full
window, so that window attention is a reshape.
"""

import io
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from segzero_jax.decoding import MAX_SIDE, UNDECODABLE, cause, upright

_FORMATS = ("PNG", "JPEG", "WEBP")
# Below Pillow's own decompression-bomb warning, above any photograph in the data sets.
_MAX_PIXELS = 64_000_000


class ImageError(ValueError):
    """An image that cannot be read; the message is one line and names the example."""


@dataclass(frozen=True)
class VisionSpec:
    """The image format that a checkpoint expects.

    Attributes:
      patch, temporal_patch: pixels along a patch's side, and how often a still image's patch is repeated in time.
      merge: patches along the side of a merged unit, which becomes one token.
      window_side: patches along the side of an attention window.
      mean, std: mean and standard deviation per channel, for pixels in [0, 1].
    """

    patch: int
    temporal_patch: int
    merge: int
    window_side: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def patch_width(self) -> int:
        """Values in one patch: channels x temporal patch x height x width."""
        return 3 * self.temporal_patch * self.patch**2


@dataclass(frozen=True)
class PatchedImage:
    """One image in window order: ``s`` slots, some of them empty in runs of partial windows.

    Attributes:
      patches_sc: float32 normalised pixels, 0 in empty slots; ``c`` runs over channel, time, row, column.
      patch_hw_s2: int32 row and column of each patch, 0 in empty slots.
      valid_s: bool, False for empty slots.
      unit_k: int32, for the k-th merged unit in raster order, which is the k-th image token, its index among the
        ``s / merge**2`` merged slots.
      grid: rows and columns of patches.
    """

    patches_sc: np.ndarray
    patch_hw_s2: np.ndarray
    valid_s: np.ndarray
    unit_k: np.ndarray
    grid: tuple[int, int]


def decode_image(data: bytes, name: str) -> Image.Image:
    """Decodes PNG, JPEG or WebP bytes to RGB, upright, transparency on white.

    Raises:
      ImageError: no bytes, another format, too many pixels or broken data; the message starts with ``name``.
    """
    if not data:
        raise ImageError(f"{name}: no image, expected the bytes of a PNG, JPEG or WebP")
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        if image.width * image.height > _MAX_PIXELS:
            raise ImageError(f"{name}: image of {image.width}x{image.height} pixels, expected at most {_MAX_PIXELS}")
        if max(image.size) > MAX_SIDE:
            raise ImageError(
                f"{name}: image of {image.width}x{image.height}, expected at most {MAX_SIDE} pixels a side"
            )
        image.load()
        return _to_rgb(upright(image))
    except UNDECODABLE as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"{name}: image cannot be read ({cause(error)}), expected a PNG, JPEG or WebP") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: convert() would clip at 255 instead of scaling.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")
    return image.convert("RGB")


def patch_image(
    image: Image.Image,
    size: tuple[int, int],
    spec: VisionSpec,
    resampling: Image.Resampling = Image.Resampling.BICUBIC,
) -> PatchedImage:
    """Resizes to ``size`` (width, height; whole merged units), normalises and cuts into patches in window order."""
    unit = spec.patch * spec.merge
    if size[0] % unit or size[1] % unit:
        raise ValueError(f"image size {size[0]}x{size[1]}: expected multiples of {unit}")
    pixels = np.asarray(image if image.size == size else image.resize(size, resampling))
    rows, columns, side = size[1] // spec.patch, size[0] // spec.patch, spec.patch
    raster_s, unit_k = window_order(rows, columns, spec.merge, spec.window_side)
    valid_s, at = raster_s >= 0, raster_s[raster_s >= 0]
    bytes_scyx = pixels.reshape(rows, side, columns, side, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, side, side)[at]
    patches_sctyx = np.zeros((len(raster_s), 3, spec.temporal_patch, side, side), np.float32)
    for channel, table in enumerate(_pixel_tables(spec.mean, spec.std)):
        patches_sctyx[valid_s, channel] = table[bytes_scyx[:, channel, None]]
    patch_hw_s2 = np.zeros((len(raster_s), 2), np.int32)
    patch_hw_s2[valid_s] = np.stack(np.divmod(at, columns), axis=1)
    return PatchedImage(patches_sctyx.reshape(len(raster_s), -1), patch_hw_s2, valid_s, unit_k, (rows, columns))


@lru_cache
def _pixel_tables(mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """float32 [3, 256]: every byte normalised, rounded where transformers rounds: scaled in float64, then float32."""
    scaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    return (scaled[None] - np.array(mean, np.float32)[:, None]) / np.array(std, np.float32)[:, None]


@lru_cache
def window_order(rows: int, columns: int, merge: int, window: int) -> tuple[np.ndarray, np.ndarray]:
    """The slot of each patch of a grid. Sizes are in patches: ``window`` and ``merge`` are side lengths.

    Slots come in runs, each the size of a full window. Full windows have a run each; partial windows, at the right and
    lower edges, share runs, the largest first, each in the first run with room. So attention stays within a run, and a
    patch attends to those in its run that are in its window. Within a window, merged units are in raster order, and
    patches within their unit, as in transformers' ``get_vision_window_index``.

    Returns:
      int32 [S], the raster index of the patch in each slot, -1 in empty ones; and int32 [K], the merged slot of each
      unit.
    """
    down, across, units = rows // merge, columns // merge, window // merge
    grid = np.arange(down * across, dtype=np.int32).reshape(down, across)
    corners = [(top, left) for top in range(0, down, units) for left in range(0, across, units)]
    windows = [grid[top : top + units, left : left + units].reshape(-1) for top, left in corners]
    runs: list[list[np.ndarray]] = [[each] for each in windows if each.size == units**2]
    shared = len(runs)
    for part in sorted((each for each in windows if each.size < units**2), key=len, reverse=True):
        room = (run for run in runs[shared:] if sum(map(len, run)) + part.size <= units**2)
        fitting = next(room, None)
        if fitting is None:
            runs.append([part])
        else:
            fitting.append(part)
    unit_of_slot = np.full(len(runs) * units**2, -1, np.int32)
    for first, run in zip(range(0, unit_of_slot.size, units**2), runs, strict=True):
        taken = np.concatenate(run)
        unit_of_slot[first : first + taken.size] = taken
    slot_of_unit = np.zeros(grid.size, np.int32)
    slot_of_unit[unit_of_slot[unit_of_slot >= 0]] = np.flatnonzero(unit_of_slot >= 0)
    patches = np.arange(rows * columns, dtype=np.int32).reshape(down, merge, across, merge).transpose(0, 2, 1, 3)
    raster = np.where(unit_of_slot[:, None] < 0, -1, patches.reshape(grid.size, -1)[unit_of_slot]).reshape(-1)
    for array in (raster, slot_of_unit):
        array.setflags(write=False)  # Cached: shared by every image of this size.
    return raster, slot_of_unit
