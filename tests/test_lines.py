"""One's own folder: what a line may hold, and that a mistake in one costs no other line its place."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import question_sources as sources
from PIL import Image
from question_sources import HEIGHT, WIDTH, encoded, picture, rectangle

from segzero_jax.data import build, builder, pictures, records
from segzero_jax.data.pipeline import Source, open_split
from segzero_jax.data.records import built_directory
from segzero_jax.overlay import decode_mask
from segzero_jax.prompt import question_text
from segzero_jax.types import Frame, ObjectPrompt

BOX = [{"bbox_2d": [10, 20, 90, 80], "point_2d": [50, 60]}]


def run(tmp_path: Path, source: Path, *options: str) -> int:
    return build.main(["mine", f"--source={source}", f"--data-dir={tmp_path / 'built'}", "--workers=1", *options])


def write(folder: Path, rows: list[Any], split: str = "train") -> None:
    (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))


def opened(tmp_path: Path, split: str = "train") -> Source:
    return open_split("mine", split, tmp_path / "built")


def left_out(tmp_path: Path) -> dict[str, str]:
    rows = (built_directory("mine", tmp_path / "built") / "left_out.jsonl").read_text().splitlines()
    return {row["id"]: row["reason"] for row in map(json.loads, rows)}


def line(**changed: Any) -> dict[str, Any]:
    """A line as it should be, but for what is changed; a value of None is JSON's null."""
    return {"image": "images/0.jpg", "question": "mug", "mask": "masks/one.png"} | changed


def without_mask(**changed: Any) -> dict[str, Any]:
    return {"image": "images/0.jpg", "question": "mug"} | changed


BAD_VALUES = {
    "question null": (line(question=None), "question null, expected text"),
    "question a number": (line(question=7), "question 7, expected text"),
    "question half a character": (line(question="\ud83d"), 'question "\\ud83d", expected text'),
    "image null": (line(image=None), "image null, expected text"),
    "image a list": (line(image=["a.jpg"]), 'image ["a.jpg"], expected text'),
    "mask a number": (line(mask=5), "mask 5, expected text"),
    "mask a list": (line(mask=["masks/one.png"]), 'mask ["masks/one.png"], expected text'),
    "mask null, as pandas writes an empty cell": (
        line(mask=None),
        "mask null, expected a file; where nothing answers: masks []",
    ),
    "mask empty": (line(mask=""), 'mask "", expected a file; where nothing answers: masks []'),
    "masks text": (without_mask(masks="masks/one.png"), 'masks "masks/one.png", expected a list of text'),
    "masks with null": (without_mask(masks=[None]), "masks [null], expected a list of text"),
    "ignore a number": (line(ignore=True), "ignore true, expected text"),
    "objects text": (without_mask(objects="<box>(1,2)</box>"), 'objects "<box>(1,2)</box>", expected a list'),
    "no object": (["a", "b"], "no 'image', found list"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_VALUES)
def test_a_value_of_another_type_is_named_with_its_line(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row, expected = BAD_VALUES[case]
    folder = sources.lines(tmp_path / "s")
    write(folder, [line(), row])
    assert run(tmp_path, folder) == 2
    complaint = capsys.readouterr().err.strip()
    assert complaint == f"segzero_jax.data.build: {folder}/train.jsonl:2: {expected}"


def test_null_is_no_id_and_no_instance(tmp_path: Path) -> None:
    folder = sources.lines(tmp_path / "s")
    write(folder, [line(question=text, id=None, instance=None) for text in ("mug", "jug")])
    write(folder, [line(image="images/1.jpg")], "val")
    assert run(tmp_path, folder) == 0
    mug, jug = opened(tmp_path)
    assert (mug.id, jug.id) == ("train-000000", "train-000001")
    assert mug.instance_id != jug.instance_id


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85"])
def test_a_line_ends_at_a_newline_alone(tmp_path: Path, character: str) -> None:
    folder = sources.lines(tmp_path / "s")
    rows = [line(question=f"the red{character}mug"), line(question="the mug")]
    text = json.dumps(rows[0], ensure_ascii=False)
    (folder / "train.jsonl").write_bytes(f"\ufeff{text}\r\n{json.dumps(rows[1])}\r\n".encode())
    assert run(tmp_path, folder) == 0
    assert [example.question for example in opened(tmp_path)] == [row["question"] for row in rows]


def test_a_file_in_another_encoding_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = sources.lines(tmp_path / "s")
    text = f"{json.dumps(line())}\n{json.dumps(line(question='the café'), ensure_ascii=False)}"
    (folder / "train.jsonl").write_bytes(text.encode("cp1252"))
    assert run(tmp_path, folder) == 2
    complaint = capsys.readouterr().err.strip()
    assert f"{folder}/train.jsonl:2: not JSON" in complaint
    assert len(complaint.splitlines()) == 1


WRONG = f"a mask of 50x50 pixels, expected the picture's {WIDTH}x{HEIGHT}"


@pytest.mark.parametrize("key", ["mask", "ignore"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_mask_of_another_size_costs_its_own_question_alone(tmp_path: Path, key: str, place: int) -> None:
    folder = sources.lines(tmp_path / "s")
    Image.fromarray(rectangle(1, 1, 9, 9, 50, 50)).save(folder / "masks/small.png")
    rows = [line(id=f"q{n}") for n in range(3)]
    rows[place][key] = "masks/small.png"
    write(folder, rows)
    assert run(tmp_path, folder) == 0
    assert left_out(tmp_path) == {f"q{place}": WRONG}
    assert [example.id for example in opened(tmp_path)] == [f"q{n}" for n in range(3) if n != place]


def test_masks_of_a_turned_picture_may_be_of_its_size_before_or_after(tmp_path: Path) -> None:
    """EXIF says that the picture lies on its side: without masks of its unturned pixels it is turned upright."""
    folder = sources.lines(tmp_path / "s")
    turned = Image.Exif()
    turned[0x0112] = 6
    for n in range(3):
        (folder / f"images/{n}.jpg").write_bytes(encoded(picture(n), exif=turned))
    Image.fromarray(rectangle(10, 20, 30, 40, HEIGHT, WIDTH)).save(folder / "masks/upright.png")
    Image.fromarray(rectangle(1, 1, 9, 9, 50, 50)).save(folder / "masks/small.png")
    unturned, upright, small = ({"mask": f"masks/{name}.png"} for name in ("one", "upright", "small"))
    write(folder, [line(id="a", **small), line(id="b", **unturned)])
    image = {"image": "images/1.jpg"}
    write(folder, [line(id="c", **upright, **image), line(id="d", **unturned, **image)], "val")
    write(folder, [line(id="e", image="images/2.jpg", **unturned)], "test")
    assert run(tmp_path, folder) == 0
    (b,), (c,), (e,) = (opened(tmp_path, split) for split in ("train", "val", "test"))
    assert [(one.id, one.frame) for one in (b, c, e)] == [
        ("b", Frame(WIDTH, HEIGHT)),
        ("c", Frame(HEIGHT, WIDTH)),
        ("e", Frame(WIDTH, HEIGHT)),
    ]
    assert c.objects[0].box == (10, 20, 30, 40)
    assert left_out(tmp_path) == {
        "a": WRONG,
        "d": f"a mask of {WIDTH}x{HEIGHT} pixels, expected the picture's {HEIGHT}x{WIDTH}",
    }


def test_a_mask_that_no_decoder_takes_costs_its_own_question_alone(tmp_path: Path) -> None:
    folder = sources.lines(tmp_path / "s")
    Image.new("1", (14_000, 13_000)).save(folder / "masks/huge.png")  # More than Pillow decodes unasked.
    write(folder, [line(id="a"), line(id="b", mask="masks/huge.png"), line(id="c")])
    assert run(tmp_path, folder) == 0
    assert left_out(tmp_path)["b"].startswith("a mask cannot be read (Image size (182000000 pixels) exceeds limit")
    assert [example.id for example in opened(tmp_path)] == ["a", "c"]


def test_damaged_pictures_are_told_by_their_files_and_counted_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = sources.lines(tmp_path / "s")
    whole = (folder / "images/0.jpg").read_bytes()
    damaged = {"a.jpg": b"none", "b.jpg": b"neither", "c.jpg": whole[:-700], "d.jpg": whole[:-900]}
    for name, data in damaged.items():
        (folder / "images" / name).write_bytes(data)
    write(folder, [line()] * 40 + [line(id=name, image=f"images/{name}") for name in damaged])
    assert run(tmp_path, folder) == 0
    reasons = left_out(tmp_path)
    assert reasons["a.jpg"] == "picture cannot be read (cannot identify image file), in images/a.jpg"
    assert reasons["b.jpg"] == reasons["a.jpg"].replace("a.jpg", "b.jpg")
    assert reasons["c.jpg"].endswith("not processed)), in images/c.jpg"), reasons["c.jpg"]
    assert "left out: 4 (picture cannot be read)\n" in capsys.readouterr().out


def test_masks_and_boxes_of_one_picture(tmp_path: Path) -> None:
    """A mask has two points, a box one: both kinds are kept, in whatever order the lines are."""
    folder = sources.lines(tmp_path / "s")
    boxed = [without_mask(id=f"box{n}", objects=BOX) for n in range(2)]
    masked = [line(id=f"mask{n}") for n in range(2)]
    write(folder, [masked[0], boxed[0], masked[1], boxed[1], without_mask(id="nothing", masks=[])])
    assert run(tmp_path, folder) == 0
    assert left_out(tmp_path) == {}
    found = {example.id: example for example in opened(tmp_path)}
    assert found.keys() == {"mask0", "box0", "mask1", "box1", "nothing"}
    for n in range(2):
        assert found[f"box{n}"].objects == (ObjectPrompt((10, 20, 90, 80), ((50, 60),)),)
        assert found[f"box{n}"].mask is None
        (target,) = found[f"mask{n}"].objects
        assert (target.box, len(target.points)) == ((10, 10, 40, 40), 2)
    assert found["nothing"].objects == ()
    assert len({example.image for example in found.values()}) == 1


def test_targets_of_a_picture_that_is_stored_smaller_are_in_its_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "MAX_PIXELS", WIDTH * HEIGHT // 4)
    folder = sources.lines(tmp_path / "s")
    write(folder, [line(id="mask", ignore="masks/left.png"), without_mask(id="box", objects=BOX)])
    assert run(tmp_path, folder) == 0
    found = {example.id: example for example in opened(tmp_path)}
    assert {example.frame for example in found.values()} == {Frame(WIDTH // 2, HEIGHT // 2)}
    assert found["box"].objects == (ObjectPrompt((5, 10, 45, 40), ((25, 30),)),)
    (target,) = found["mask"].objects
    np.testing.assert_allclose(target.box, (5, 5, 20, 20), atol=1)
    for mask, bounds in ((found["mask"].mask, (5, 5, 20, 20)), (found["mask"].ignore, (2, 10, 15, 35))):
        rows, columns = np.nonzero(decode_mask(vars(mask)))
        np.testing.assert_allclose((columns.min(), rows.min(), columns.max(), rows.max()), bounds, atol=1)


def test_the_page_shows_lines_that_are_read_and_how_a_question_is_asked(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs/data.md").read_text()
    shown = re.findall(r'^    (\{"image".*)$', page, re.MULTILINE)
    folder = sources.lines(tmp_path / "s")
    for name in ("a", "b"):
        (folder / f"images/{name}.jpg").write_bytes(encoded(picture(ord(name))))
    for name in ("a", "a-1", "a-2"):
        Image.fromarray(rectangle(10, 10, 40, 40)).save(folder / f"masks/{name}.png")
    (folder / "val.jsonl").write_text("\n".join(shown))
    assert run(tmp_path, folder) == 0
    assert len(opened(tmp_path, "val")) == len(shown) == 5
    ((stored, asked),) = re.findall(r'"([^"]+)" becomes "([^"]+)"', page)
    assert (question_text("toy", stored), stored != asked) == (f'Find "{asked}".', True)


def test_a_box_without_a_point_has_its_centre(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = sources.lines(tmp_path / "s")
    bare = {"bbox_2d": [20, 10, 61, 50]}
    write(folder, [without_mask(objects=[*BOX, bare]), without_mask(objects=[bare | {"point_2d": None}]), line()])
    write(folder, [without_mask(objects=BOX, image="images/1.jpg")], "val")
    assert run(tmp_path, folder) == 0
    assert (
        "points: 2 target boxes have neither point_2d nor a mask, their centres are taken\n" in capsys.readouterr().out
    )
    centred = ObjectPrompt((20, 10, 61, 50), ((40, 30),))  # of 40.5 the even one
    found = {example.id: example.objects for example in opened(tmp_path)}
    assert found["train-000000"] == (ObjectPrompt((10, 20, 90, 80), ((50, 60),)), centred)
    assert found["train-000001"] == (centred,)
    assert len(found["train-000002"][0].points) == 2, "a mask's own"
    assert json.loads((built_directory("mine", tmp_path / "built") / "build.json").read_text())["centred"] == 2


def test_a_set_that_is_read_as_it_always_was_is_what_it_was(tmp_path: Path) -> None:
    """Once, a box without a point cost its question, and a mask in JPEG did not: such sets alone are other ones now."""
    digests = []
    for name, row in {
        "with": without_mask(objects=BOX),
        "without": without_mask(objects=[{"bbox_2d": [1, 2, 30, 40]}]),
        "mask": line(),
        "JPEG": line(mask="masks/one.JPG"),
    }.items():
        folder = sources.lines(tmp_path / name)
        (folder / "masks/one.JPG").write_bytes((folder / "masks/one.png").read_bytes())
        write(folder, [row])
        plan = builder.make_plan(build.find_form("mine", [folder], None))
        cut = [(shard.name, shard.rows) for shard in plan.shards]
        told = json.dumps([plan.files, cut, records.VERSION, builder._READING])
        digests.append(plan.digest == hashlib.sha256(told.encode()).hexdigest())
    assert digests == [True, False, True, False]


MALFORMED = {
    "no box": ({"bbox": [1, 2, 30, 40], "label": "mug"}, "object 0: bbox_2d is missing, found bbox, label"),
    "a point alone": ({"point_2d": [5, 6]}, "object 0: bbox_2d is missing, found point_2d"),
    "nothing": ({}, "object 0: bbox_2d is missing, found nothing"),
    "a list": ([1, 2, 30, 40], "object 0: bbox_2d is missing, found [1, 2, 30, 40]"),
    "three corners": ({"bbox_2d": [1, 2, 30]}, "object 0: bbox_2d [1, 2, 30], expected [x1, y1, x2, y2]"),
    "a box of text": ({"bbox_2d": "1 2 30 40"}, 'object 0: bbox_2d "1 2 30 40", expected [x1, y1, x2, y2]'),
    "a box of bools": ({"bbox_2d": [True, 2, 30, 40]}, "bbox_2d [true, 2, 30, 40], expected [x1, y1, x2, y2]"),
    "half a point": ({"bbox_2d": [1, 2, 30, 40], "point_2d": [5]}, "object 0: point_2d [5], expected [x, y]"),
    "no number": ({"bbox_2d": [1, 2, 30, 40], "point_2d": [5, float("nan")]}, "point_2d [5, NaN], expected [x, y]"),
    "an empty point": ({"bbox_2d": [1, 2, 30, 40], "point_2d": []}, "object 0: point_2d [], expected [x, y]"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_an_object_that_is_malformed_says_what_is_missing(case: str, tmp_path: Path) -> None:
    given, expected = MALFORMED[case]
    folder = sources.lines(tmp_path / "s")
    write(folder, [line(id="fine"), without_mask(id="bad", objects=[given])])
    assert run(tmp_path, folder) == 0
    (reason,) = left_out(tmp_path).values()
    assert reason.endswith(expected)
    assert len(reason) < 100


@pytest.mark.parametrize("changed", ["masks/one.png", "masks/right.png", "masks/blurred.png"])
def test_a_mask_that_has_changed_is_another_source(
    tmp_path: Path, changed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of ``mask``, ``masks`` and ``ignore``: by content, for a corrected mask may have as many bytes as before."""
    folder = sources.lines(tmp_path / "s")
    mask = Image.open(folder / changed)
    mask.save(folder / changed, compress_level=0)
    size = (folder / changed).stat().st_size
    assert run(tmp_path, folder) == 0
    assert run(tmp_path, folder) == 0
    assert "built already, from the same source" in capsys.readouterr().out
    Image.fromarray(~np.asarray(mask)).save(folder / changed, compress_level=0)
    assert (folder / changed).stat().st_size == size
    assert run(tmp_path, folder) == 2
    assert "built already, from another source or by an older version; --rebuild" in capsys.readouterr().err
    old = list(opened(tmp_path))
    assert run(tmp_path, folder, "--rebuild") == 0
    new = list(opened(tmp_path))
    assert [(one.mask, one.ignore) for one in old] != [(one.mask, one.ignore) for one in new]


def test_a_mask_that_comes_later_is_another_source(tmp_path: Path) -> None:
    """One that is not there costs its question; once it is, the set is not the same any more."""
    folder = sources.lines(tmp_path / "s")
    write(folder, [line(id="a"), line(id="b", mask="masks/late.png")])
    assert run(tmp_path, folder) == 0
    assert "No such file" in left_out(tmp_path)["b"]
    Image.fromarray(rectangle(1, 2, 30, 40)).save(folder / "masks/late.png")
    assert run(tmp_path, folder) == 2
    assert run(tmp_path, folder, "--rebuild") == 0
    assert left_out(tmp_path) == {}


def test_pictures_may_lie_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``--images`` is where; lines and masks stay in the source."""
    folder = sources.lines(tmp_path / "s")
    assert run(tmp_path, folder) == 0
    beside = [list(opened(tmp_path, split)) for split in ("train", "val")]
    (tmp_path / "photos").mkdir()
    (folder / "images").rename(tmp_path / "photos/images")
    assert run(tmp_path, folder, "--rebuild") == 2
    assert f"4 of 4 pictures are missing, the first is {folder}/images/0.jpg" in capsys.readouterr().err
    assert run(tmp_path, folder, "--rebuild", f"--images={tmp_path / 'photos'}") == 0
    assert [list(opened(tmp_path, split)) for split in ("train", "val")] == beside


@pytest.mark.parametrize(("make", "what"), [(sources.mask_parquet, "parquet files"), (sources.reason_seg, "ReasonSeg")])
def test_where_pictures_have_their_place_another_is_refused(
    make: Any, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, make(tmp_path / "s"), f"--images={tmp_path}") == 2
    assert f"--images {tmp_path}: " in (complaint := capsys.readouterr().err)
    assert what in complaint
