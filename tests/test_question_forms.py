"""What is read from each source: rows with the right pixels, targets and names; what is wrong is left out by name."""

import itertools
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import question_sources as sources
from PIL import Image
from pycocotools import mask as coco
from question_sources import HEIGHT, WIDTH, deep_rgb_png, encoded, picture, polygon, rectangle

from segzero_jax.data import build
from segzero_jax.data.forms.coco import CocoJson, annotation_mask
from segzero_jax.data.forms.form import SourceError, coco_id, unique
from segzero_jax.data.forms.hub_parquet import HubParquet
from segzero_jax.data.forms.lines import Lines
from segzero_jax.data.forms.reason_seg import ReasonSeg, paint
from segzero_jax.data.forms.refer import Refer
from segzero_jax.data.pipeline import Source, open_split
from segzero_jax.data.records import built_directory
from segzero_jax.types import Example, Frame, ObjectPrompt, RleMask


def built(tmp_path: Path, name: str, source: Path, *options: str) -> Path:
    out = tmp_path / "built"
    arguments = [name, "--source", str(source), "--data-dir", str(out), "--workers=1", *options]
    assert build.main(arguments) == 0
    return out


def left_out(out: Path, name: str) -> dict[str, str]:
    rows = (built_directory(name, out) / "left_out.jsonl").read_text().splitlines()
    return {row["id"]: row["reason"] for row in map(json.loads, rows)}


def pixels(mask: RleMask | None) -> np.ndarray:
    assert mask is not None
    return coco.decode({"size": [mask.height, mask.width], "counts": mask.counts}).astype(bool)


def ids(source: Source) -> list[str]:
    return [example.id for example in source]


def box(example: Example) -> tuple[float, ...]:
    (target,) = example.objects
    return target.box


def test_seg_zeros_training_set(tmp_path: Path) -> None:
    source = open_split("r", "train", built(tmp_path, "r", sources.solution_parquet(tmp_path / "s")))
    assert ids(source) == [f"refcocog_{16000 + n}" for n in range(6)]
    example = source[4]
    assert example.question == "The thing number 4."
    assert example.frame == Frame(84, 84)
    assert example.image == encoded(picture(1004).resize((84, 84)), "PNG")
    assert box(example) == (4, 10, 40, 60)
    assert example.objects[0].points == ((20, 30), (30, 44))
    assert example.mask is None
    assert source.texts() == [(one.id, one.question) for one in source]


def test_vision_reasoners_training_set(tmp_path: Path) -> None:
    nothing = ["[]"] + ['[{"bbox_2d": [4, 10, 40, 60], "point_2d": [20, 30]}]'] * 5
    made = sources.solution_parquet(tmp_path / "s", multiple=True)
    many = open_split("many", "train", built(tmp_path, "many", made))
    assert [target.box for target in many[0].objects] == [(4, 10, 40, 60), (50, 8, 80, 30)]
    assert [target.points for target in many[0].objects] == [((20, 30),), ((64, 20),)]
    made = sources.solution_parquet(tmp_path / "t", multiple=True, solution=nothing)
    none = open_split("none", "train", built(tmp_path, "none", made))
    assert none[0].objects == ()
    assert not pixels(none[0].mask).any()
    assert none[1].mask is None


def test_the_hubs_evaluation_sets(tmp_path: Path) -> None:
    source = open_split("ReasonSeg", "test", built(tmp_path, "ReasonSeg", sources.mask_parquet(tmp_path / "s")))
    for n, example in enumerate(source):
        expected = rectangle(10 + n, 20, 70, 60)
        np.testing.assert_array_equal(pixels(example.mask), expected)
        assert box(example) == (10 + n, 20, 70, 60)
        assert len(example.objects[0].points) == 2
        assert (example.id, example.image_id) == (f"test-picture_{n}-{n}", f"ReasonSeg:test/picture_{n}")
    # Of sets made from RefCOCO, a number is COCO's.
    made = sources.mask_parquet(
        tmp_path / "t",
        split="testA",
        image_id=["391895", "42", "COCO_train2014_000000000009", "7"],
        text=[["the cat", "a cat there"]] * 4,
    )
    source = open_split("refcoco", "testA", built(tmp_path, "refcoco", made))
    assert [example.image_id for example in source] == ["coco:391895", "coco:42", "coco:9", "coco:7"]
    assert {example.question for example in source} == {"the cat"}, "of several sentences the first"


@pytest.mark.parametrize(
    ("name", "by", "splits"),
    [
        ("refcoco", "unc", ("train", "val", "testA", "testB")),
        ("refcoco+", "unc", ("train", "val", "testA", "testB")),
        ("refcocog", "umd", ("train", "val", "test")),
        ("refcocog", "google", ("train", "val")),
    ],
)
def test_refer(tmp_path: Path, name: str, by: str, splits: tuple[str, ...]) -> None:
    folder = sources.refer(tmp_path / "s", name, by, splits)
    if by != "google":
        (folder / name / "refs(google).p").write_bytes(b"passed over")
    out = built(tmp_path, name, folder)
    for number, split in enumerate(splits):
        source = open_split(name, split, out)
        assert len(source) == 8
        first, again, other = source[0], source[1], source[2]
        assert (first.question, again.question, other.question) == (
            "the left one",
            "thing 0 on the picture",
            "the right one",
        )
        assert box(first) == box(again) == (8, 12, 47, 70)
        np.testing.assert_array_equal(pixels(other.mask), rectangle(60, 20, 110, 80))
        assert first.image_id == f"coco:{390000 + 2 * number}"
        assert first.instance_id == again.instance_id != other.instance_id
        assert first.image == other.image == encoded(picture(3000 + 2 * number))


def test_a_pickle_runs_no_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "trapped",)

    folder = sources.refer(tmp_path / "s")
    (folder / "refcoco/refs(unc).p").write_bytes(pickle.dumps([Trap()]))
    assert build.main(["refcoco", "--source", str(folder), "--data-dir", str(tmp_path / "out")]) == 2
    assert "not a pickle of plain values: it wants to load" in capsys.readouterr().err
    assert not (tmp_path / "trapped").exists()


def test_reason_seg(tmp_path: Path) -> None:
    out = built(tmp_path, "ReasonSeg", sources.reason_seg(tmp_path / "s"))
    train, val, test = (open_split("ReasonSeg", split, out) for split in ("train", "val", "test"))
    assert ids(train) == ["train-100_a", "train-100_a-sentence-2", "train-101_b"]
    assert [one.question for one in train][:2] == ["what keeps one dry?", "the thing against rain"]
    assert train[0].instance_id == train[1].instance_id
    np.testing.assert_array_equal(pixels(train[2].mask), rectangle(5, 30, 90, 80))
    assert len(val) == 1
    np.testing.assert_array_equal(pixels(val[0].mask), rectangle(20, 20, 79, 69) & ~rectangle(30, 30, 49, 49))
    np.testing.assert_array_equal(pixels(val[0].ignore), rectangle(30, 30, 49, 49))
    nothing, cafe = test
    assert nothing.objects == ()
    assert not pixels(nothing.mask).any()
    np.testing.assert_array_equal(pixels(nothing.ignore), rectangle(3, 3, 8, 8))
    assert cafe.question == "the dog\u2019s café", "Windows' code page; and evaluation asks the first sentence only"
    assert cafe.ignore is None


def test_polygons_of_any_size_are_painted_from_large_to_small() -> None:
    shapes = [("target", [[2.7, 2.2], [5.9, 2.9]]), ("Ignored", [[9, 9]]), ("target", [])]
    target, ignore = paint(shapes, Frame(12, 12))
    np.testing.assert_array_equal(np.argwhere(target), [[2, 2], [2, 3], [2, 4], [2, 5]])
    np.testing.assert_array_equal(np.argwhere(ignore), [[9, 9]])
    target, _ = paint([("target", [[1, 1], [9, 1], [9, 9]])], Frame(12, 12))
    assert (target[3, 7], target[7, 3]) == (True, False)


def test_the_edges_of_a_polygon_belong_to_it() -> None:
    """Every pixel of the lines between its corners, as OpenCV's ``polylines`` and ``fillPoly`` paint it for LISA."""
    corners = [[2, 2], [13, 3], [12, 10], [5, 12]]
    target, _ = paint([("target", corners)], Frame(16, 16))
    assert np.flatnonzero(target[2]).tolist() == [2, 3, 4, 5, 6, 7]
    for (x1, y1), (x2, y2) in zip(corners, corners[1:] + corners[:1], strict=True):
        steps = max(abs(x2 - x1), abs(y2 - y1))
        for step in range(steps + 1):
            x, y = x1 + (x2 - x1) * step / steps, y1 + (y2 - y1) * step / steps
            # A line halfway between two pixels takes either.
            near = [(int(np.floor(v + 0.49)), int(np.floor(v + 0.51))) for v in (x, y)]
            assert target[np.ix_(near[1], near[0])].any(), (x, y)
    thin, _ = paint([("target", [[0, 0], [11, 1], [0, 1]])], Frame(12, 4))
    assert thin[:2].sum() == thin.sum() == 18


@pytest.mark.parametrize(
    ("points", "shown"),
    [
        (None, "null, expected [[x, y], [x, y], ...]"),
        ([[1, 2, 3]], "[1, 2, 3], expected [x, y]"),
        ([20, 30, 60, 80], "20, expected [x, y]"),
        ([["a", "b"]], '["a", "b"], expected [x, y]'),
        ([[float("nan"), 1], [2, 3]], "[NaN, 1], expected [x, y]"),
        ([[1e12, 1e12], [0, 0], [5, 9]], "[1000000000000.0, 1000000000000.0], expected [x, y]"),
    ],
)
def test_a_polygon_of_reason_seg_that_is_none_leaves_its_questions_out(points: Any, shown: str, tmp_path: Path) -> None:
    folder = sources.reason_seg(tmp_path / "s")
    shapes = [sources.shape("target", 10, 10, 60, 50), {"label": "target", "points": points}]
    (folder / "train/100_a.json").write_text(json.dumps({"text": ["q"], "shapes": shapes}))
    out = built(tmp_path, "ReasonSeg", folder)
    assert left_out(out, "ReasonSeg") == {"train-100_a": f"shape 1: points {shown}"}
    assert ids(open_split("ReasonSeg", "train", out)) == ["train-101_b"]


def test_shapes_of_labelme_that_are_no_polygons(tmp_path: Path) -> None:
    """A rectangle has two corners; what else is drawn otherwise leaves its questions out."""
    folder = sources.reason_seg(tmp_path / "s")
    for stem, kind in {"train/101_b": "rectangle", "test/103_d": "circle"}.items():
        path = folder / f"{stem}.json"
        content = json.loads(path.read_bytes().decode("cp1252"))
        content["shapes"] = [{"label": "target", "shape_type": kind, "points": [[60, 50], [10, 20]]}]
        content["shapes"].append({"label": "flag", "shape_type": "circle", "points": []})
        path.write_text(json.dumps(content))
    out = built(tmp_path, "R", folder)
    example = open_split("R", "train", out)[2]
    np.testing.assert_array_equal(pixels(example.mask), rectangle(10, 20, 60, 50))
    assert set(left_out(out, "R").values()) == {"shape 0: a circle of LabelMe's, expected a polygon or a rectangle"}


def test_other_json_files_beside_cocos_are_passed_over(tmp_path: Path) -> None:
    folder = sources.coco_json(tmp_path / "s")
    (folder / "classes.json").write_text('["mug"]')
    assert len(open_split("c", "train", built(tmp_path, "c", folder))) == 2


def test_parquet_files_in_a_folder_that_is_a_link(tmp_path: Path) -> None:
    there = sources.mask_parquet(tmp_path / "elsewhere", rows=1)
    (tmp_path / "s").mkdir()
    (tmp_path / "s/data").symlink_to(there / "data")
    assert len(open_split("r", "test", built(tmp_path, "r", tmp_path / "s"))) == 1


def test_parquet_files_of_half_a_download_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = sources.solution_parquet(tmp_path / "s")
    (second,) = folder.rglob("train-00001-of-00002.parquet")
    earlier = second.with_name("train-00000-of-00001.parquet")
    shutil.copy(second, earlier)
    assert build.main(["r", "--source", str(folder), "--data-dir", str(tmp_path / "built")]) == 2
    assert "train-*-of-00001 and -of-00002, expected the files of one version" in capsys.readouterr().err
    earlier.unlink()
    second.unlink()
    assert build.main(["r", "--source", str(folder), "--data-dir", str(tmp_path / "built")]) == 2
    assert ": 1 of 2 files train-*-of-00002, expected all" in capsys.readouterr().err


def test_pictures_of_cocos_json_may_be_in_a_folder_of_the_splits_name(tmp_path: Path) -> None:
    folder = sources.coco_json(tmp_path / "s")
    (folder / "train2017").rename(folder / "train")
    assert len(open_split("c", "train", built(tmp_path, "c", folder))) == 2


@pytest.mark.parametrize("option", ["--source", "--images"])
def test_a_bucket_is_no_source(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"--source": str(tmp_path), option: "gs://bucket/pictures"}
    assert build.main(["r", *itertools.chain(*given.items()), "--data-dir", str(tmp_path / "built")]) == 2
    said = capsys.readouterr().err
    assert f"{option}=gs:/" in said.replace("//", "/")
    assert said.endswith("expected a folder on this machine's disk, got a URL; copy what is there to a disk first\n")


def test_references_below_under_another_name_are_pointed_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = sources.refer(tmp_path / "s")
    assert build.main(["mine", "--source", str(folder), "--data-dir", str(tmp_path / "built")]) == 2
    said = capsys.readouterr().err
    assert f"--source {folder}: holds refcoco/refs(unc).p; name its folder, --source {folder}/refcoco" in said


def test_a_parquet_file_without_rows_is_no_split(tmp_path: Path) -> None:
    folder = sources.mask_parquet(tmp_path / "s", rows=1)
    whole = pq.read_table(folder / "data/test-00000-of-00001.parquet")
    pq.write_table(whole.slice(0, 0), folder / "data/val-00000-of-00001.parquet")
    out = built(tmp_path, "r", folder)
    assert len(open_split("r", "test", out)) == 1
    with pytest.raises(ValueError, match="split 'val' of data set r: expected one of test"):
        open_split("r", "val", out)


@pytest.mark.parametrize("suffix", [".png", ".jpeg", ".webp", ".JPG"])
def test_pictures_of_reason_seg_in_other_formats(suffix: str, tmp_path: Path) -> None:
    folder = sources.reason_seg(tmp_path / "s")
    (folder / "train/100_a.jpg").rename(folder / f"train/100_a{suffix}")
    out = built(tmp_path, "ReasonSeg", folder)
    first = open_split("ReasonSeg", "train", out)[0]
    assert (first.id, first.image_id) == ("train-100_a", "ReasonSeg:train/100_a")
    assert box(first) == (10, 10, 60, 50)


def test_ones_own_folder(tmp_path: Path) -> None:
    out = built(tmp_path, "mine", sources.lines(tmp_path / "s"))
    mug, mugs = open_split("mine", "train", out)
    np.testing.assert_array_equal(pixels(mug.mask), rectangle(10, 10, 40, 40))
    np.testing.assert_array_equal(pixels(mug.ignore), rectangle(0, 0, 5, 5))
    assert [target.box for target in mugs.objects] == [(4, 20, 30, 70), (70, 20, 110, 70)]
    np.testing.assert_array_equal(pixels(mugs.mask), rectangle(4, 20, 30, 70) | rectangle(70, 20, 110, 70))
    sofa, unicorn = open_split("mine", "val", out)
    assert (sofa.id, sofa.instance_id, sofa.mask) == ("sofa", "mine:images/2.jpg:seat", None)
    assert (box(sofa), sofa.objects[0].points) == ((10, 20, 90, 80), ((50, 60),))
    assert unicorn.objects == ()
    assert not pixels(unicorn.mask).any()


MASKS = {
    "1-bit": Image.fromarray(rectangle(11, 12, 13, 14)),
    "0 and 255": Image.fromarray(rectangle(11, 12, 13, 14).astype(np.uint8) * 255),
    "0 and 1": Image.fromarray(rectangle(11, 12, 13, 14).astype(np.uint8)),
    "16-bit": Image.fromarray(rectangle(11, 12, 13, 14).astype(np.uint16) * 7),
    "rgb": Image.fromarray(np.dstack([rectangle(11, 12, 13, 14).astype(np.uint8) * v for v in (0, 9, 0)])),
    "rgba": Image.fromarray(
        np.dstack([np.full((HEIGHT, WIDTH, 3), 255, np.uint8), rectangle(11, 12, 13, 14).astype(np.uint8)])
    ),
}
PALETTE = Image.fromarray(rectangle(11, 12, 13, 14).astype(np.uint8), "P")
PALETTE.putpalette([255, 255, 255, 9, 0, 0])  # How the colours look says nothing.
MASKS["palette"] = PALETTE
HOLED = Image.fromarray(np.where(rectangle(11, 12, 13, 14), 9, 200).astype(np.uint8))
HOLED.info["transparency"] = 200
MASKS["grey with a transparent one"] = HOLED


@pytest.mark.parametrize("kind", MASKS)
def test_a_mask_file_of_any_kind(tmp_path: Path, kind: str) -> None:
    folder = sources.lines(tmp_path / "s")
    MASKS[kind].save(folder / "masks/one.png")
    mug = open_split("mine", "train", built(tmp_path, "mine", folder))[0]
    np.testing.assert_array_equal(pixels(mug.mask), rectangle(11, 12, 13, 14))


@pytest.mark.parametrize("column", ["mask", "ignore"])
def test_a_mask_of_another_size_than_its_picture_is_left_out_by_name(column: str, tmp_path: Path) -> None:
    folder = sources.lines(tmp_path / "s")
    Image.fromarray(rectangle(1, 1, 5, 5, 10, 12)).save(folder / "masks/small.png")
    row = {"image": "images/0.jpg", "question": "the red mug", "mask": "masks/one.png", "id": "small"}
    with (folder / "train.jsonl").open("a") as file:
        file.write("\n" + json.dumps(row | {column: "masks/small.png"}))
    out = built(tmp_path, "mine", folder)
    assert left_out(out, "mine") == {"small": "a mask of 10x12 pixels, expected the picture's 128x96"}


def test_a_mask_in_a_palette_that_a_program_has_made_is_refused(tmp_path: Path) -> None:
    """It may number white 0 and black 1: everything but the object would be the target."""
    folder = sources.lines(tmp_path / "s")
    grey = Image.fromarray(rectangle(1, 2, 3, 4).astype(np.uint8) * 255)
    numbered = grey.quantize(2)
    assert numbered.getpalette("RGB")[:6] == [255, 255, 255, 0, 0, 0], "what Pillow makes of it"
    numbered.save(folder / "masks/one.png")
    found = left_out(built(tmp_path, "mine", folder), "mine")
    reason = "a mask in a palette whose 0 is not black while another number is, expected grey: masks/one.png"
    assert reason in found.values()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(("m.jpg", {"quality": 100}), ("m.webp", {"quality": 90}), ("m.png", {"format": "JPEG"}), ("film.webp", {})),
        *(("m.tif", {"compression": "jpeg"}), ("inks.tif", {})),
        # An odd number of bytes before the pixels, and one more that makes it even.
        ("m.webp", {"quality": 90, "icc_profile": b"odd"}),
    ],
)
def test_a_mask_in_a_lossy_format_is_refused(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """What looks like 0 around its object is 1 or 2. In inks, 0 is no colour, and the fourth is no transparency."""
    folder = sources.lines(tmp_path / "s")
    mask = Image.fromarray(rectangle(11, 13, 50, 45).astype(np.uint8) * 255)
    mask = mask.convert("CMYK") if name == "inks.tif" else mask
    film = {"save_all": True, "append_images": [Image.new("L", mask.size)]} if name == "film.webp" else {}
    mask.save(folder / "masks" / name, **options, **film)
    row = {"image": "images/0.jpg", "question": "the red mug", "mask": f"masks/{name}", "id": "lossy"}
    with (folder / "train.jsonl").open("a") as file:
        file.write("\n" + json.dumps(row))
    out = built(tmp_path, "mine", folder)
    kind = {"webp": "WEBP", "tif": "TIFF"}.get(name.rpartition(".")[2], "JPEG")
    why = "a mask in inks, expected PNG: masks/inks.tif is CMYK"
    if name != "inks.tif":
        why = f"a mask in a lossy format, expected PNG: masks/{name} is {kind}"
    assert left_out(out, "mine") == {"lossy": why}


def test_of_several_masks_none_may_be_without_pixels(tmp_path: Path) -> None:
    """The question would mean fewer objects than it names."""
    folder = sources.lines(tmp_path / "s")
    Image.new("L", (WIDTH, HEIGHT)).save(folder / "masks/none.png")
    row = {
        "image": "images/0.jpg",
        "question": "both mugs",
        "masks": ["masks/one.png", "masks/none.png"],
        "id": "fewer",
    }
    with (folder / "train.jsonl").open("a") as file:
        file.write("\n" + json.dumps(row))
    assert left_out(built(tmp_path, "mine", folder), "mine") == {"fewer": "a target mask without pixels"}


def test_a_mask_of_16_bits_a_colour_is_refused(tmp_path: Path) -> None:
    """Pillow has its upper half alone: of numbers up to 255, nothing."""
    folder = sources.lines(tmp_path / "s")
    deep = deep_rgb_png(np.repeat(rectangle(11, 12, 13, 14)[..., None], 3, 2).astype(np.uint16) * 200)
    (folder / "masks/deep.png").write_bytes(deep)
    row = {"image": "images/0.jpg", "question": "the red mug", "mask": "masks/deep.png", "id": "deep"}
    with (folder / "train.jsonl").open("a") as file:
        file.write("\n" + json.dumps(row))
    expected = "a mask of 16 bits a colour, expected 8 bits, or grey: masks/deep.png"
    assert left_out(built(tmp_path, "mine", folder), "mine") == {"deep": expected}


@pytest.mark.parametrize("alpha", [False, True])
def test_a_mask_in_webp_without_loss_is_taken(alpha: bool, tmp_path: Path) -> None:
    folder = sources.lines(tmp_path / "s")
    mask = rectangle(11, 13, 50, 45).astype(np.uint8) * 255
    image = Image.fromarray(np.dstack([mask, mask, mask, mask]) if alpha else mask)
    # With EXIF the pixels are not in the file's first part.
    image.save(folder / "masks/one.png", "WEBP", lossless=True, exif=Image.Exif().tobytes())
    mug = open_split("mine", "train", built(tmp_path, "mine", folder))[0]
    np.testing.assert_array_equal(pixels(mug.mask), rectangle(11, 13, 50, 45))


def test_cocos_json_with_questions(tmp_path: Path) -> None:
    out = built(tmp_path, "c", sources.coco_json(tmp_path / "s"))
    dogs, unicorn = open_split("c", "train", out)
    assert [target.box for target in dogs.objects] == [(8, 8, 40, 40), (60, 10, 90, 80)]
    np.testing.assert_array_equal(pixels(dogs.ignore), rectangle(100, 50, 120, 90))
    assert (dogs.question, dogs.image_id) == ("both dogs", "coco:600")
    assert unicorn.objects == ()


def test_cocos_json_without_questions_asks_for_categories(tmp_path: Path) -> None:
    folder = sources.coco_json(tmp_path / "s", questions=False)
    # A crowd alone is nothing to ask for.
    change(
        folder, lambda content: content["annotations"].append(content["annotations"][2] | {"id": 5, "image_id": 601})
    )
    out = built(tmp_path, "c", folder)
    for split in ("train", "val"):
        dogs, sofa = open_split("c", split, out)
        assert (dogs.question, len(dogs.objects), sofa.question, box(sofa)) == ("dog", 2, "sofa", (5, 5, 60, 60))
        np.testing.assert_array_equal(pixels(dogs.ignore), rectangle(100, 50, 120, 90))


@pytest.mark.parametrize("empty", [{"segmentation": []}, {"segmentation": None}, {"segmentation": [[]]}, {}])
def test_cocos_boxes_without_a_segmentation_are_targets(
    tmp_path: Path, empty: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a question whose annotations have masks too, each object has one point."""

    def boxes_alone(content: dict[str, Any]) -> None:
        boxes = [60, 10, 31, 71], [100, 50, 21, 41], [5, 5, 56, 56]
        for annotation, box in zip(content["annotations"][1:], boxes, strict=True):
            del annotation["segmentation"]
            annotation.update(bbox=box, **empty)

    folder = sources.coco_json(tmp_path / "s", questions=False)
    change(folder, boxes_alone)
    out = built(tmp_path, "c", folder)
    assert (
        "points: 2 target boxes have neither point_2d nor a mask, their centres are taken\n" in capsys.readouterr().out
    )
    dogs, sofa = open_split("c", "train", out)
    assert dogs.objects == (ObjectPrompt((8, 8, 40, 40), ((24, 24),)), ObjectPrompt((60, 10, 90, 80), ((75, 45),)))
    assert sofa.objects == (ObjectPrompt((5, 5, 60, 60), ((32, 32),)),)
    assert dogs.mask is sofa.mask is None
    assert not pixels(dogs.ignore).any(), "a crowd's box says too little"
    masked, _ = open_split("c", "val", out)
    assert [len(target.points) for target in masked.objects] == [2, 2]


def test_cocos_boxes_share_a_picture_with_masks(tmp_path: Path) -> None:
    """Each kind in a record of its own, for a mask has two points."""
    folder = sources.coco_json(tmp_path / "s")
    change(folder, lambda content: content["annotations"][1].update(segmentation=[], bbox=[60, 10, 31, 71]))
    more = [{"image_id": 600, "text": f"dog {n}", "annotation_ids": [n]} for n in (1, 2)]
    change(folder, lambda content: content["questions"].extend(more))
    source = open_split("c", "train", built(tmp_path, "c", folder))
    assert {one.question: [len(target.points) for target in one.objects] for one in source} == {
        "both dogs": [1, 1],
        "dog 1": [2],
        "dog 2": [1],
        "the unicorn": [],
    }


@pytest.mark.parametrize(
    ("bbox", "reason"),
    [
        ([60, 10, 31], "bbox [60, 10, 31], expected [x, y, width, height]"),
        (None, "bbox null, expected [x, y, width, height]"),
        ([60, 10, 0, 71], "a target box without area, [60, 10, 59, 80]"),
        ([60, 10, 90, 71], "a target box [60, 10, 149, 80] outside the 128x96 picture"),
        ([60, 10, 31, 88], "a target box [60, 10, 90, 97] outside the 128x96 picture"),
        ([-1, 10, 31, 71], "a target box [-1, 10, 29, 80] outside the 128x96 picture"),
        ([60, -1, 31, 71], "a target box [60, -1, 90, 69] outside the 128x96 picture"),
    ],
)
def test_a_box_of_coco_that_is_none_leaves_its_question_out(tmp_path: Path, bbox: Any, reason: str) -> None:
    folder = sources.coco_json(tmp_path / "s", questions=False)
    change(folder, lambda content: content["annotations"][3].update(segmentation=[], bbox=bbox))
    out = built(tmp_path, "c", folder)
    assert left_out(out, "c") == {"601-9": reason}


def test_questions_about_nothing_are_about_different_things(tmp_path: Path) -> None:
    """By instance, each counts; two questions for the same annotations are one thing."""
    folder = sources.coco_json(tmp_path / "s")
    more = [
        {"image_id": 601, "text": "the dragon", "annotation_ids": []},
        {"image_id": 601, "text": "the griffin", "annotation_ids": []},
        {"image_id": 601, "text": "the sofa", "annotation_ids": [4]},
        {"image_id": 601, "text": "the couch", "annotation_ids": [4]},
    ]
    change(folder, lambda content: content["questions"].extend(more))
    _, unicorn, dragon, griffin, sofa, couch = open_split("c", "train", built(tmp_path, "c", folder))
    assert len({one.instance_id for one in (unicorn, dragon, griffin, sofa)}) == 4
    assert sofa.instance_id == couch.instance_id


@pytest.mark.parametrize("ann_id", [None, [None, "7", None, "7"]])
def test_rows_of_parquet_without_an_annotation_are_about_different_things(tmp_path: Path, ann_id: Any) -> None:
    image = {"bytes": encoded(picture(1)), "path": None}
    made = sources.mask_parquet(tmp_path / "s", image=[image] * 4, image_id=["a"] * 4, ann_id=ann_id or [None] * 4)
    seats = [one.instance_id for one in open_split("r", "test", built(tmp_path, "r", made))]
    assert len(set(seats)) == (4 if ann_id is None else 3)
    assert ann_id is None or seats[1] == seats[3]


def test_of_cocos_archive_the_instances_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = sources.coco_json(tmp_path / "s", questions=False)
    for split in ("train", "val"):
        instances = json.loads((folder / f"annotations/instances_{split}2017.json").read_text())
        for task, annotation in {
            "captions": {"id": 1, "image_id": instances["images"][0]["id"], "caption": "two dogs"},
            "person_keypoints": instances["annotations"][0] | {"category_id": 1, "keypoints": [0] * 51},
            "stuff": instances["annotations"][3] | {"category_id": 100},
        }.items():
            content = instances | {"annotations": [annotation]}
            (folder / f"annotations/{task}_{split}2017.json").write_text(json.dumps(content))
    (folder / "annotations/image_info_test2017.json").write_text(json.dumps({"images": instances["images"]}))
    out = built(tmp_path, "c", folder)
    assert [one.question for one in open_split("c", "train", out)] == ["dog", "sofa"]
    assert [one.question for one in open_split("c", "val", out)] == ["dog", "sofa"]
    assert "c/test" not in capsys.readouterr().out


def test_annotations_in_any_form() -> None:
    mask = rectangle(10, 20, 30, 40)
    frame = Frame(WIDTH, HEIGHT)
    compressed = coco.encode(np.asfortranarray(mask, np.uint8))
    text = {"size": compressed["size"], "counts": compressed["counts"].decode()}
    flat = polygon(10, 20, 30, 40)
    for segmentation in ([flat], compressed, text, [flat, [1, 1, 2, 2]], flat):
        np.testing.assert_array_equal(annotation_mask(segmentation, frame), mask)
    assert not annotation_mask([[1, 1, 2, 2]], frame).any()
    assert not annotation_mask([], frame).any()


SIZE = [HEIGHT, WIDTH]
BAD_SEGMENTATIONS = {
    "another size": {"size": [5, 5], "counts": "a"},
    "no size": {"counts": "a"},
    "size is a number": {"size": 5, "counts": "a"},
    "too few": {"size": SIZE, "counts": [3]},
    "below 0": {"size": SIZE, "counts": [-3, HEIGHT * WIDTH + 3]},
    "no counts": {"size": SIZE},
    "fractions": {"size": SIZE, "counts": [0.5, HEIGHT * WIDTH - 0.5]},
    "no text": {"size": SIZE, "counts": ""},
    "text for too few": {"size": SIZE, "counts": "00"},
    "text without an end": {"size": SIZE, "counts": "P"},
    "text of another kind": {"size": SIZE, "counts": "\u00e9 "},
    "nothing": None,
    "a number and a polygon": [5, polygon(1, 1, 5, 5)],
    "odd": [[1, 1, 5, 5, 9, 9, 3]],
    "flat and odd": [1, 1, 5, 5, 9, 9, 3],
    "text in a polygon": [[1, 1, 5, "5", 9, 9]],
    "no polygon": [None],
    "not finite": [[1, 1, 5, float("nan"), 9, 9]],
    "far away": [[1, 1, 5, 1e12, 9, 9]],
}


@pytest.mark.parametrize("case", BAD_SEGMENTATIONS)
def test_an_annotation_in_no_form_is_told(case: str) -> None:
    with pytest.raises(ValueError, match="expected") as caught:
        annotation_mask(BAD_SEGMENTATIONS[case], Frame(WIDTH, HEIGHT))
    assert len(str(caught.value).splitlines()) == 1


def test_compressed_run_lengths_are_read_as_they_were_written() -> None:
    rng = np.random.default_rng(0)
    for share in (0.01, 0.5, 0.999):
        mask = rng.random((HEIGHT, WIDTH)) < share
        runs = coco.encode(np.asfortranarray(mask, np.uint8))
        np.testing.assert_array_equal(annotation_mask(runs, Frame(WIDTH, HEIGHT)), mask)


def test_a_segmentation_in_no_form_leaves_its_question_out(tmp_path: Path) -> None:
    folder = sources.coco_json(tmp_path / "s", questions=False)
    change(folder, lambda content: content["annotations"][3].update(segmentation=[1, 1, 5]))
    out = built(tmp_path, "c", folder)
    assert left_out(out, "c") == {"601-9": "polygon [1, 1, 5]: expected [x, y, x, y, ...]"}
    assert [one.question for one in open_split("c", "train", out)] == ["dog"]


# What is done to a column of twelve rows, the id of the row that is left out, and why.
PNG = encoded(picture(9).resize((84, 84)), "PNG")
BAD_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "empty text": ({"problem": " . "}, "an empty question"),
    "no text": ({"problem": None}, "an empty question"),
    "box without area": (
        {"solution": "<box>(4,10),(4,60)</box><points>(4,30),(4,44)</points>"},
        "a target box without area, [4, 10, 4, 60]",
    ),
    "box outside": (
        {"solution": "<box>(4,10),(85,60)</box><points>(4,30),(4,44)</points>"},
        "a target box [4, 10, 85, 60] outside the 84x84 picture",
    ),
    "point outside": (
        {"solution": "<box>(4,10),(80,60)</box><points>(4,30),(4,99)</points>"},
        "a target point outside the 84x84 picture, ((4.0, 30.0), (4.0, 99.0))",
    ),
    "no solution": ({"solution": "over there"}, "solution: expected"),
    "damaged picture": ({"image": {"bytes": PNG[:-300], "path": None}}, "picture cannot be read"),
    "no picture": ({"image": {"bytes": None, "path": "gone.png"}}, "no picture"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_row_that_cannot_be_used_is_left_out_by_name(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, reason = BAD_ROWS[case]
    table = sources.solution_parquet(tmp_path / "first", rows=12)
    whole = pa.concat_tables([pa.parquet.read_table(path) for path in sorted(table.rglob("*.parquet"))])
    columns = {name: whole[name].to_pylist() for name in whole.column_names}
    ((column, value),) = change.items()
    columns[column][7] = value
    columns["solution"][3] = "<box>(0,0),(84,84)</box><points>(0,84),(84,0)</points>"  # its edges are of the picture
    out = built(tmp_path, "r", sources.solution_parquet(tmp_path / "s", rows=12, **columns))
    assert list(left_out(out, "r")) == ["refcocog_16007"]
    assert left_out(out, "r")["refcocog_16007"].startswith(reason)
    source = open_split("r", "train", out)
    assert ids(source) == [f"refcocog_{16000 + n}" for n in range(12) if n != 7]
    printed = capsys.readouterr().out
    (told,) = [line for line in printed.splitlines() if line.startswith("left out: 1 (")]
    assert not any(letter.isdigit() for letter in told.removeprefix("left out: 1")), "what other rows have too"
    assert "left_out.jsonl" in printed


def test_masks_that_are_wrong_are_left_out_by_name(tmp_path: Path) -> None:
    masks = [rectangle(10, 20, 70, 60).tolist() for _ in range(30)]
    masks[3] = rectangle(1, 1, 2, 2, 50, 50).tolist()
    masks[5] = [[True, False], [True]]
    masks[7] = []
    masks[8] = np.zeros((HEIGHT, WIDTH), bool).tolist()
    columns = {"mask": masks} | {
        name: [f"{name}{n}" for n in range(30)] for name in ("image_id", "ann_id", "text")
    }  # fmt: skip
    images = [{"bytes": encoded(picture(n)), "path": None} for n in range(30)]
    made = sources.mask_parquet(tmp_path / "s", rows=30, image=images, **columns)
    out = built(tmp_path, "r", made)
    assert left_out(out, "r") == {
        "test-image_id3-ann_id3": "picture of 128x96 pixels, expected the annotated 50x50, "
        "in test-00000-of-00001.parquet: test-image_id3-ann_id3",
        "test-image_id5-ann_id5": "a mask whose rows have different lengths",
        "test-image_id7-ann_id7": "no mask",
    }
    assert open_split("r", "test", out)[5].objects == (), "a mask without pixels is a question without a target"


ENCODED_MASK = encoded(Image.fromarray(rectangle(10, 20, 70, 60)), "PNG")
TYPES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "a picture's path": (sources.solution_parquet, {"image": ["a.png"] * 6}, "column image: string, expected encoded"),
    "lists of pictures": (
        sources.mask_parquet,
        {"image": [[PNG]] * 4},
        "column image: list<element: binary>, expected encoded pictures, binary or {bytes, path}",
    ),
    "paths alone": (
        sources.mask_parquet,
        {"image": [{"path": "a"}] * 4},
        "column image: struct<path: string>, expected",
    ),
    "a solution that is a list": (
        sources.solution_parquet,
        {"solution": [[{"bbox_2d": [4, 10, 40, 60]}]] * 6},
        "column solution: list<element: struct<bbox_2d: list<element: int64>>>, expected text",
    ),
    "no problem": (sources.solution_parquet, {"problem": [None] * 6}, "column problem: null, expected text"),
    "questions that are numbers": (sources.mask_parquet, {"text": [[1]] * 4}, "column text: list<element: int64>"),
    "a flat mask": (
        sources.mask_parquet,
        {"mask": [[True] * 9] * 4},
        "column mask: list<element: bool>, expected rows of bool or of whole numbers, or encoded pictures",
    ),
    "a mask of probabilities": (
        sources.mask_parquet,
        {"mask": [[[0.5, 0.0]]] * 4},
        "column mask: list<element: list<element: double>>, expected rows of bool",
    ),
    "a mask of nothing": (
        sources.mask_parquet,
        {"mask": [[[None]]] * 4},
        "column mask: list<element: list<element: null",
    ),
}


@pytest.mark.parametrize("case", TYPES)
def test_a_column_of_another_type_is_told_before_anything_is_read(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, columns, expected = TYPES[case]
    folder = make(tmp_path / "s", **columns)
    assert build.main(["r", "--source", str(folder), "--data-dir", str(tmp_path / "out")]) == 2
    complaint = capsys.readouterr().err
    assert f"-00000-of-0000{2 if make is sources.solution_parquet else 1}.parquet: {expected}" in complaint
    assert complaint.count("\n") == 1


@pytest.mark.parametrize(
    "mask",
    [
        pa.array([rectangle(10, 20, 70, 60).tolist()] * 4, pa.large_list(pa.large_list(pa.bool_()))),
        pa.array([rectangle(10, 20, 70, 60).tolist()] * 4, pa.list_(pa.list_(pa.bool_(), WIDTH), HEIGHT)),
        pa.array([(255 * rectangle(10, 20, 70, 60).astype(int)).tolist()] * 4, pa.list_(pa.list_(pa.uint8()))),
        pa.array([ENCODED_MASK] * 4),
        pa.array([ENCODED_MASK] * 4, pa.large_binary()),
        pa.array([{"bytes": ENCODED_MASK, "path": "m.png"}] * 4),
    ],
    ids=lambda mask: str(mask.type)[:40],
)
def test_a_mask_in_parquet_of_any_kind(mask: pa.Array, tmp_path: Path) -> None:
    out = built(tmp_path, "r", sources.mask_parquet(tmp_path / "s", mask=mask))
    np.testing.assert_array_equal(pixels(open_split("r", "test", out)[3].mask), rectangle(10, 20, 70, 60))


def test_the_question_of_a_parquet_with_masks_may_have_a_solution_too(tmp_path: Path) -> None:
    out = built(tmp_path, "r", sources.mask_parquet(tmp_path / "s", solution=["a crow"] * 4))
    assert box(open_split("r", "test", out)[0]) == (10, 20, 70, 60)


NULLS: dict[str, tuple[dict[str, Any], str]] = {
    "pixels": (
        {"mask": [[None] * WIDTH, *rectangle(10, 20, 70, 60).tolist()[1:]]},
        f"a mask with pixels that are null, {WIDTH} of {WIDTH * HEIGHT}",
    ),
    "a row": ({"mask": [None, *rectangle(10, 20, 70, 60).tolist()[1:]]}, "a mask with rows that are null"),
    "a mask": ({"mask": None}, "no mask"),
    "bytes": ({"image": {"bytes": None, "path": "a.png"}}, "no picture but its path, a.png: expected its bytes"),
    "a picture": ({"image": None}, "no picture"),
}


@pytest.mark.parametrize("case", NULLS)
def test_what_is_null_in_parquet_is_no_answer(case: str, tmp_path: Path) -> None:
    """Read as 0, a mask of nulls would say that nothing in the picture answers the question."""
    ((column, value),), reason = NULLS[case][0].items(), NULLS[case][1]
    table = pa.parquet.read_table(sources.mask_parquet(tmp_path / "first"))
    values = table[column].to_pylist()
    values[2] = value
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()}) if column == "image" else table[column].type
    out = built(tmp_path, "r", sources.mask_parquet(tmp_path / "s", **{column: pa.array(values, kind)}))
    assert left_out(out, "r") == {"test-picture_2-2": reason}


def test_an_object_that_is_ignored_as_a_whole_is_left_out(tmp_path: Path) -> None:
    """An answer without objects would be as right as the object's own box, and neither could be told."""
    folder = sources.lines(tmp_path / "s")
    Image.fromarray(rectangle(10, 10, 40, 39)).save(folder / "masks/blurred.png")
    assert left_out(built(tmp_path, "mine", folder), "mine") == {}, "a row of pixels counts"
    Image.fromarray(rectangle(10, 10, 40, 40)).save(folder / "masks/blurred.png")
    out = built(tmp_path / "again", "mine", folder)
    assert left_out(out, "mine") == {"train-000000": "a target mask that is ignored as a whole"}
    assert len(open_split("mine", "train", out)) == 1


def test_an_object_without_pixels_is_left_out(tmp_path: Path) -> None:
    folder = sources.refer(tmp_path / "s")
    path = folder / "refcoco/instances.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["segmentation"] = [[5, 5, 5, 5, 5, 5]]
    path.write_text(json.dumps(content))
    references = folder / "refcoco/refs(unc).p"
    with references.open("rb") as file:
        rows = pickle.load(file)
    for row in rows:
        row["split"] = "train"
    references.write_bytes(pickle.dumps(rows, protocol=0))
    out = built(tmp_path, "refcoco", folder)
    assert list(left_out(out, "refcoco").values()) == ["a target mask without pixels"] * 2
    source = open_split("refcoco", "train", out)
    assert len(source) == 30
    assert source[0].question == "the right one"
    assert box(source[0]) == (60, 20, 110, 80)


def test_ids_stay_unique(tmp_path: Path) -> None:
    made = sources.solution_parquet(tmp_path / "s", id=["a", "b", "a", "a-2", "a", "c"])
    assert ids(open_split("r", "train", built(tmp_path, "r", made))) == ["a", "b", "a-3", "a-2", "a-4", "c"]
    assert unique(["x", "x", "x-2", "x"]) == ["x", "x-3", "x-2", "x-4"]


def test_names_of_cocos_pictures() -> None:
    assert coco_id("train2014/COCO_train2014_000000391895.jpg") == "coco:391895"
    assert coco_id("000000000009.jpg") is None, "anybody numbers pictures"
    assert coco_id("000000000009.jpg", from_coco=True) == "coco:9"
    assert coco_id("COCO_train2014_000000581857_16.jpg") == "coco:581857"
    assert [coco_id(name, from_coco=True) for name in ("391895.jpg", "photo.jpg", "")] == [None] * 3


def remove(*names: str) -> Any:
    def change(folder: Path) -> None:
        for path in folder.rglob("*"):
            if path.name in names:
                path.unlink()

    return change


def write(name: str, content: str) -> Any:
    return lambda folder: (folder / name).write_text(content)


def change(folder: Path, how: Any) -> None:
    """Changes COCO's train file."""
    path = folder / "annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    how(content)
    path.write_text(json.dumps(content))


def instances(spoil: Any, questions: bool = True) -> tuple[Any, Any]:
    """COCO's JSON and what spoils it."""
    return lambda folder: sources.coco_json(folder, questions), lambda folder: change(folder, spoil)


def pickled(spoil: Any) -> Any:
    def spoilt(folder: Path) -> None:
        path = folder / "refcoco/refs(unc).p"
        with path.open("rb") as file:
            references = pickle.load(file)
        spoil(references)
        path.write_bytes(pickle.dumps(references, protocol=0))

    return spoilt


BAD_SOURCES: dict[str, tuple[Any, Any, str]] = {
    "picture missing": (sources.lines, remove("2.jpg"), "1 of 4 pictures are missing, the first is"),
    "no pictures": (
        sources.refer,
        lambda folder: (folder / "train2014").rename(folder / "elsewhere"),
        "references without pictures, expected COCO's train2014 in",
    ),
    "not JSON": (sources.reason_seg, write("val/102_c.json", "{"), "102_c.json: not JSON"),
    "no text": (sources.reason_seg, write("val/102_c.json", '{"shapes": []}'), "102_c.json: no 'text', found shapes"),
    **{
        f"ReasonSeg's {name} is {value}": (
            sources.reason_seg,
            write("val/102_c.json", json.dumps({"text": "q", "shapes": [{"label": "target", "points": []}]} | value)),
            f"102_c.json: {expected}",
        )
        for name, value, expected in (
            ("text", {"text": None}, "text: expected text, found None"),
            ("text", {"text": 3}, "text: expected text, found 3"),
            ("text", {"text": []}, "no text, expected a question"),
            ("text", {"text": [None]}, "text: expected text, found None"),
            ("text", {"text": ["q", 1]}, "text: expected text, found 1"),
            ("text", {"text": "\ud800"}, 'text: expected text, found halves of characters in "\\ud800"'),
            ("shapes", {"shapes": {}}, "shapes: expected a list, found {}"),
            ("shapes", {"shapes": None}, "shapes: expected a list, found None"),
            ("shapes", {"shapes": [3]}, "shape 0: no 'label', found int"),
            ("label", {"shapes": [{"label": None, "points": []}]}, "shape 0: label: expected text, found None"),
            ("points", {"shapes": [{"label": "target"}]}, "shape 0: no 'points', found label"),
        )
    },
    "not a line of JSON": (sources.lines, write("train.jsonl", "{}\n{"), "train.jsonl:2: not JSON"),
    "no image": (sources.lines, write("train.jsonl", '{"question": "q"}'), "train.jsonl:1: no 'image', found question"),
    "two targets": (
        sources.lines,
        write("train.jsonl", '{"image": "i", "question": "q", "mask": "m", "masks": []}'),
        "train.jsonl:1: expected one of mask, masks, objects",
    ),
    "not parquet": (sources.mask_parquet, write("data/test-1.parquet", "PAR"), "test-1.parquet: not a parquet file"),
    "annotation missing": (
        sources.coco_json,
        write("annotations/a.json", '{"images": [{"id": 1, "file_name": "f"}], "annotations": [], "questions": '
              '[{"image_id": 1, "text": "t", "annotation_ids": [5]}]}'),
        "a.json: a question refers to annotation 5",
    ),
    "one id for two annotations": (
        *instances(lambda content: content["annotations"].append(content["annotations"][0] | {"image_id": 601})),
        "instances_train2017.json: annotations: two with id 1, expected one",
    ),
    "one id for two pictures": (
        *instances(lambda content: content["images"].append(content["images"][0] | {"file_name": "b.jpg"}), False),
        "instances_train2017.json: images: two with id 600, expected one",
    ),
    "a question that names no annotations": (
        *instances(lambda content: content["questions"][0].pop("annotation_ids")),
        "instances_train2017.json: questions: no 'annotation_ids', found image_id, text, ignored_ids",
    ),
    "an annotation of another picture": (
        *instances(lambda content: content["questions"][0].update(annotation_ids=[1, 4])),
        "a question about image 600 means annotation 4, which is in image 601",
    ),
    "a split that would be all": (
        sources.lines,
        lambda folder: (folder / "train.jsonl").rename(folder / "all.jsonl"),
        "split 'all', expected another name",
    ),
    "two files for a split": (
        sources.coco_json,
        write("annotations/instances_train2014.json", '{"images": []}'),
        "instances_train2017.json: split train, which",
    ),
    "picture unknown": (
        sources.coco_json,
        write("annotations/a.json", '{"images": [], "annotations": [], "questions": [{"image_id": 1, "text": "t"}]}'),
        "questions about image_id 1, which is not among its images",
    ),
    "no segmentation": (
        *instances(lambda content: content["annotations"][0].pop("segmentation")),
        "annotation 1: no 'segmentation', found id, image_id",
    ),
    "no segmentation of a category": (
        *instances(lambda content: content["annotations"][0].pop("segmentation"), questions=False),
        "annotation 1: no 'segmentation', found id, image_id",
    ),
    "no width": (
        *instances(lambda content: content["images"][0].pop("width")),
        "image 600: no 'width', found id, file_name",
    ),
    "width in words": (
        *instances(lambda content: content["images"][0].update(width="wide")),
        "image 600: size wide x 96, expected whole numbers from 1",
    ),
    "width without end": (
        *instances(lambda content: content["images"][0].update(width=float("inf"))),
        "image 600: size inf x 96, expected whole numbers from 1",
    ),
    "no file name": (
        *instances(lambda content: content["images"][0].pop("file_name")),
        "image 600: no 'file_name', found id, width",
    ),
    "no id of an annotation": (
        *instances(lambda content: content["annotations"][0].pop("id")),
        "annotations: no 'id', found image_id",
    ),
    "an id that is a list": (
        *instances(lambda content: content["images"][0].update(id=[1])),
        "images: id: expected a number or text, found [1]",
    ),
    "annotations that are no list": (
        *instances(lambda content: content.update(annotations=None)),
        "annotations: expected a list, found None",
    ),
    "an annotation that is a number": (
        *instances(lambda content: content["annotations"].append(5)),
        "annotations: no 'id', found int",
    ),
    "no category": (
        *instances(lambda content: content["annotations"][0].pop("category_id"), questions=False),
        "annotation 1: no 'category_id', found id, image_id",
    ),
    "a category without a name": (
        *instances(lambda content: content["categories"][0].pop("name"), questions=False),
        "categories: no 'name', found id",
    ),
    "a question that is a number": (
        *instances(lambda content: content["questions"][0].update(text=5)),
        "questions: text: expected text, found 5",
    ),
    "annotation ids that are no list": (
        *instances(lambda content: content["questions"][0].update(annotation_ids=1)),
        "annotation_ids: expected a list, found 1",
    ),
    "an annotation id that is a list": (
        *instances(lambda content: content["questions"][0].update(annotation_ids=[[1]])),
        "a question refers to annotation [1], which does not exist",
    ),
    "a file that is a list": (
        sources.coco_json,
        write("annotations/a.json", '[{"images": []}]'),
        "a.json: no 'images', found list",
    ),
    "a reference without an object": (
        sources.refer,
        pickled(lambda references: references[0].pop("ann_id")),
        "reference 3900000: no 'ann_id', found ref_id",
    ),
    "a reference that is a number": (
        sources.refer,
        pickled(lambda references: references.append(5)),
        "refs(unc).p: no 'ref_id', found int",
    ),
    "a sentence without an id": (
        sources.refer,
        pickled(lambda references: references[0]["sentences"][0].pop("sent_id")),
        "sentences: no 'sent_id', found sent",
    ),
    "a picture of REFER without a size": (
        sources.refer,
        lambda folder: write(
            "refcoco/instances.json", (folder / "refcoco/instances.json").read_text().replace("height", "tall")
        )(folder),
        "instances.json: image 390000: no 'height', found id",
    ),
    "nothing known": (lambda folder: folder.mkdir() or folder, lambda folder: None, "found none of parquet files"),
    "no questions": (
        sources.lines,
        lambda folder: [write(f"{split}.jsonl", "")(folder) for split in ("train", "val")],
        "no questions",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_SOURCES)
def test_a_source_that_is_not_as_it_should_be_is_one_line(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, spoil, expected = BAD_SOURCES[case]
    folder = make(tmp_path / "s")
    spoil(folder)
    name = "refcoco" if make is sources.refer else "r"
    assert build.main([name, "--source", str(folder), "--data-dir", str(tmp_path / "out")]) == 2
    complaint = capsys.readouterr().err.strip()
    assert expected in complaint
    assert len(complaint.splitlines()) == 1
    assert not list((tmp_path / "out").rglob("*.array_record*"))


def features(folder: Path) -> None:
    """A parquet file further below, that is a question set as well."""
    sources.solution_parquet(folder / "features", 2)


def stray_json(folder: Path) -> None:
    (folder / "package.json").write_text('{"images": {}, "scripts": []}')
    (folder / "broken.json").write_text("{")
    (folder / "captions_val2017.json").write_text('{"images": [], "annotations": []}')


def labelled(folder: Path) -> None:
    """What programs that draw polygons leave beside pictures: shapes, and no question."""
    (folder / "train").mkdir()
    (folder / "train/0.json").write_text('{"shapes": [], "imagePath": "0.jpg"}')


def beside(first: Any, *others: Any) -> Any:
    def make(folder: Path) -> Path:
        first(folder)
        for other in others:
            other(folder)
        return folder

    return make


def of_another_set(folder: Path) -> None:
    sources.solution_parquet(folder / "refCOCOg_9k_840", 2)


# The name, the source, and the folder and form that are meant.
MEANT = {
    "REFER beside parquet of another set": ("refcoco", beside(sources.refer, of_another_set), Refer),
    "parquet beside REFER of another set": ("refCOCOg_9k_840", beside(sources.refer, of_another_set), HubParquet),
    "REFER in COCO's folder": ("refcoco", beside(sources.refer, sources.coco_json), Refer),
    "COCO with REFER": ("coco", beside(sources.refer, sources.coco_json), CocoJson),
    "parquet of its name in COCO's folder": (
        "refCOCOg_9k_840",
        beside(sources.coco_json, of_another_set),
        HubParquet,
    ),
    "REFER beside lines": ("refcoco", beside(sources.lines, sources.refer), Refer),
    "lines over parquet": ("mine", beside(sources.lines, features), Lines),
    "lines beside strays": ("mine", beside(sources.lines, stray_json, labelled), Lines),
    "parquet beside strays": ("r", beside(sources.mask_parquet, stray_json, labelled), HubParquet),
    "parquet further below, beside strays": ("r", beside(stray_json, features), HubParquet),
    "ReasonSeg beside strays": ("r", beside(sources.reason_seg, stray_json), ReasonSeg),
    "COCO beside shapes": ("r", beside(sources.coco_json, labelled), CocoJson),
}


@pytest.mark.parametrize("case", MEANT)
def test_of_several_forms_the_one_that_is_meant(case: str, tmp_path: Path) -> None:
    name, make, form = MEANT[case]
    (tmp_path / "s").mkdir()
    assert isinstance(build.find_form(name, [make(tmp_path / "s")], None), form)


def test_a_refer_folder_beside_anothers_parquet_is_what_is_built(tmp_path: Path) -> None:
    source = beside(sources.refer, of_another_set)(tmp_path / "s")
    assert len(open_split("refcoco", "testA", built(tmp_path, "refcoco", source))) == 8
    # The folder itself may be named as well.
    form = build.find_form("mine", [source / "refcoco"], None)
    assert isinstance(form, Refer)


UNCLEAR = {
    "lines and COCO": (
        "mine",
        beside(sources.lines, stray_json, lambda folder: write("val.json", '{"info": 1, "images": [{}')(folder)),
        "train.jsonl and val.json",
    ),
    "lines and parquet": (
        "mine",
        beside(sources.lines, lambda folder: (folder / "x.parquet").touch()),
        "train.jsonl and x.parquet",
    ),
    "lines and parquet as on the hub": (
        "mine",
        beside(sources.lines, sources.mask_parquet),
        "train.jsonl and data/test-00000-of-00001.parquet",
    ),
    "lines and ReasonSeg": ("r", beside(sources.lines, sources.reason_seg), "train.jsonl and train/"),
    "COCO and parquet": (
        "r",
        beside(sources.coco_json, features),
        "features/data/train-00000-of-00002.parquet and annotations/instances_train2017.json",
    ),
    "two sets of other names": (
        "refcocog",
        beside(sources.refer, of_another_set),
        "refcoco/refs(unc).p and refCOCOg_9k_840/data/train-00000-of-00002.parquet",
    ),
    "two in the folder of its name": (
        "refcoco",
        beside(sources.refer, lambda folder: sources.mask_parquet(folder / "refcoco")),
        "refcoco/refs(unc).p and refcoco/data/test-00000-of-00001.parquet",
    ),
    "lines and parquet of its name": (
        "refCOCOg_9k_840",
        beside(sources.lines, of_another_set),
        "train.jsonl and refCOCOg_9k_840/data/train-00000-of-00002.parquet",
    ),
}


@pytest.mark.parametrize("case", UNCLEAR)
def test_a_folder_of_two_forms_is_refused_with_a_file_of_each(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, make, both = UNCLEAR[case]
    (tmp_path / "s").mkdir()
    folder = make(tmp_path / "s")
    assert build.main([name, "--source", str(folder), "--data-dir", str(tmp_path / "out"), "--workers=1"]) == 2
    complaint = capsys.readouterr().err
    assert f"--source {folder}: holds {both}" in complaint
    assert complaint.endswith("; name the folder of one, or move the others out where they share it\n")
    assert complaint.count("\n") == 1


def test_of_two_directories_neither_is_passed_over(tmp_path: Path) -> None:
    table, own = sources.solution_parquet(tmp_path / "a"), sources.lines(tmp_path / "b")
    with pytest.raises(SourceError, match="2 directories, expected one unless they all hold parquet files"):
        build.find_form("r", [table, own], None)


def test_a_schema_that_is_not_known_is_told_by_its_columns(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    pa.parquet.write_table(pa.table({"question": ["a"], "image": [b""]}), folder / "train.parquet")
    with pytest.raises(SourceError, match="columns question, image; expected id, problem, solution, image or text"):
        build.find_form("r", [folder], None)
