"""Masks lie on what they are of, in whichever of its eight EXIF orientations a picture is stored."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import question_sources as sources
from PIL import Image
from pycocotools import mask as coco
from question_sources import HEIGHT, WIDTH, polygon, rectangle

from segzero_jax.data import build
from segzero_jax.data.pictures import read_picture
from segzero_jax.data.pipeline import open_split
from segzero_jax.types import Frame

BOX = (8, 12, 47, 70)
# For each EXIF orientation what an upright picture goes through to lie as it is stored.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
# And what brings it upright again.
UPRIGHT = STORED | {6: Image.Transpose.ROTATE_270, 8: Image.Transpose.ROTATE_90}
SIDEWAYS = (5, 6, 7, 8)


def jpeg(orientation: int, as_in_file: bool = False) -> bytes:
    """A red box on black: at BOX of the upright picture or, ``as_in_file``, of the one that lies in the file."""
    image = Image.fromarray(rectangle(*BOX)[..., None] * np.array([255, 0, 0], np.uint8))
    turn = None if as_in_file else STORED[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    return sources.encoded(image if turn is None else image.transpose(turn), exif=exif, quality=95, subsampling=0)


def reason_seg(folder: Path) -> str:
    (folder / "val").mkdir(parents=True)
    for orientation in STORED:
        (folder / f"val/{orientation}.jpg").write_bytes(jpeg(orientation))
        row = {"text": ["the red thing"], "is_sentence": True, "shapes": [sources.shape("target", *BOX)]}
        (folder / f"val/{orientation}.json").write_text(json.dumps(row))
    return "val"


def hub(folder: Path) -> str:
    pictures = [{"bytes": jpeg(orientation), "path": None} for orientation in STORED]
    sources.mask_parquet(folder, len(STORED), image=pictures, mask=[rectangle(*BOX).tolist()] * len(STORED))
    return "test"


def hub_sideways_in_file(folder: Path) -> str:
    """Masks of the size that the picture has in the file: they were made there."""
    pictures = [{"bytes": jpeg(orientation, as_in_file=True), "path": None} for orientation in SIDEWAYS]
    sources.mask_parquet(folder, len(SIDEWAYS), image=pictures, mask=[rectangle(*BOX).tolist()] * len(SIDEWAYS))
    return "test"


def refer(folder: Path) -> str:
    """COCO's pictures: annotations of the file's size were made on its pixels as they lie there."""
    sources.refer(folder, splits=("val",) * 4)
    for orientation, path in zip(STORED, sorted((folder / "train2014").iterdir()), strict=True):
        path.write_bytes(jpeg(orientation, as_in_file=True))
    return "val"


def coco_json(folder: Path, orientations: tuple[int, ...], as_in_file: bool) -> str:
    (folder / "images").mkdir(parents=True)
    for orientation in orientations:
        (folder / f"images/{orientation}.jpg").write_bytes(jpeg(orientation, as_in_file))
    images = [{"id": n, "file_name": f"{n}.jpg", "width": WIDTH, "height": HEIGHT} for n in orientations]
    outlines = [{"id": n, "image_id": n, "category_id": 1, "segmentation": [polygon(*BOX)]} for n in orientations]
    content = {"images": images, "annotations": outlines, "categories": [{"id": 1, "name": "red thing"}]}
    (folder / "val.json").write_text(json.dumps(content))
    return "val"


SOURCES: dict[str, Callable[[Path], str]] = {
    "ReasonSeg": reason_seg,
    "hub": hub,
    "hub in the file": hub_sideways_in_file,
    "refcoco": refer,
    "COCO in the file": lambda folder: coco_json(folder, tuple(STORED), as_in_file=True),
    "COCO upright": lambda folder: coco_json(folder, SIDEWAYS, as_in_file=False),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_a_mask_lies_on_its_thing_in_every_orientation(tmp_path: Path, kind: str) -> None:
    split = SOURCES[kind](tmp_path / "s")
    name = "refcoco" if kind == "refcoco" else "turned"
    out = ["--data-dir", str(tmp_path / "built"), "--workers=1"]
    assert build.main([name, "--source", str(tmp_path / "s"), *out]) == 0
    found = [one for one in open_split(name, split, tmp_path / "built") if one.objects[0].box == BOX]
    count = len(SIDEWAYS) if kind in ("hub in the file", "COCO upright") else len(STORED)
    assert len({one.image_id for one in found}) == count
    for one in found:
        red = np.asarray(Image.open(io.BytesIO(one.image)).convert("RGB"))[..., 0]
        assert one.mask is not None
        mask = coco.decode({"size": [one.mask.height, one.mask.width], "counts": one.mask.counts}).astype(bool)
        assert red[mask].mean() > 240, one.id
        assert red[~mask].mean() < 5, one.id


@pytest.mark.parametrize("orientation", STORED)
def test_a_square_picture_whose_masks_lie_as_its_file_does_stays_so(orientation: int) -> None:
    """No size tells, and COCO's tools do not look at EXIF."""
    square = Image.fromarray(rectangle(0, 0, 20, 30)[:64, :64, None] * np.array([255, 0, 0], np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = sources.encoded(square, exif=exif, quality=95, subsampling=0)
    for as_in_file, turn in ((True, None), (False, UPRIGHT[orientation])):
        picture = read_picture(data, Frame(64, 64), as_in_file)
        found = np.asarray(Image.open(io.BytesIO(picture.data)).convert("RGB")).astype(int)
        wanted = np.asarray(square if turn is None else square.transpose(turn)).astype(int)
        assert np.abs(found - wanted).max() < 40
