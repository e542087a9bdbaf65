"""Small sources in the true on-disk forms of the data sets, with what is in them.

Every picture is 128 x 96 (squashed ones 84 x 84) noise over a gradient of its own, so no two look alike. Targets are
rectangles, whose boxes one can read off.
"""

import io
import json
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

WIDTH, HEIGHT = 128, 96


def picture(seed: int, width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """A picture that looks like no other seed's: coarse random cells, scaled up, with noise."""
    rng = np.random.default_rng(seed)
    cells = Image.fromarray(rng.integers(20, 236, (12, 14, 3), dtype=np.uint8))
    smooth = np.asarray(cells.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    return Image.fromarray((smooth + rng.integers(-6, 7, smooth.shape)).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def deep_rgb_png(pixels: np.ndarray) -> bytes:
    """A PNG of uint16 [H, W, 3], which Pillow reads but does not write."""
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    file = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        file += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return file


def rectangle(x1: int, y1: int, x2: int, y2: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """A mask whose inclusive bounds are these."""
    mask = np.zeros((height, width), bool)
    mask[y1 : y2 + 1, x1 : x2 + 1] = True
    return mask


def solution_parquet(folder: Path, rows: int = 6, multiple: bool = False, **replaced: Any) -> Path:
    """refCOCOg_9k_840, or VisionReasoner's with ``multiple``: two files of one split, two row groups each."""
    data = folder / "data"
    data.mkdir(parents=True)
    one = "<box>(4,10),(40,60)</box><points>(20,30),(30,44)</points>"
    many = '[{"bbox_2d": [4, 10, 40, 60], "point_2d": [20, 30]}, {"bbox_2d": [50, 8, 80, 30], "point_2d": [64, 20]}]'
    columns = {
        "id": [f"refcocog_{16000 + n}" for n in range(rows)],
        "problem": [f"The thing number {n}." for n in range(rows)],
        "solution": [many if multiple else one] * rows,
        "image": [
            {"bytes": encoded(picture(1000 + n).resize((84, 84)), "PNG"), "path": f"{n}.png"} for n in range(rows)
        ],
        "img_height": [HEIGHT] * rows,
        "img_width": [WIDTH] * rows,
    } | replaced
    table = pa.table(columns)
    half = -(-rows // 2)
    for number, start in enumerate((0, half)):
        pq.write_table(table.slice(start, half), data / f"train-{number:05d}-of-00002.parquet", row_group_size=2)
    return folder


def mask_parquet(folder: Path, rows: int = 4, split: str = "test", first: int = 2000, **replaced: Any) -> Path:
    """ReasonSeg_test or refcoco_testA: masks as lists of lists of bool, at the picture's own size."""
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    columns = {
        "image_id": [f"picture_{first - 2000 + n}" for n in range(rows)],
        "ann_id": [str(n) for n in range(rows)],
        "image": [{"bytes": encoded(picture(first + n)), "path": None} for n in range(rows)],
        "mask": [rectangle(10 + n, 20, 70, 60).tolist() for n in range(rows)],
        "text": [f"seat {n}?" for n in range(rows)],
        "img_height": [HEIGHT] * rows,
        "img_width": [WIDTH] * rows,
    } | replaced
    pq.write_table(pa.table(columns), data / f"{split}-00000-of-00001.parquet")
    return folder


def polygon(x1: int, y1: int, x2: int, y2: int) -> list[float]:
    """A COCO polygon whose mask has these inclusive bounds."""
    return [x1, y1, x2 + 1, y1, x2 + 1, y2 + 1, x1, y2 + 1]


def refer(folder: Path, name: str = "refcoco", split_by: str = "unc", splits: tuple[str, ...] = ()) -> Path:
    """REFER: two pictures a split, two objects a picture, two sentences an object; pickled as Python 2 did."""
    splits = splits or ("train", "val", "testA", "testB")
    images, annotations, references = [], [], []
    pictures = folder / "train2014"
    pictures.mkdir(parents=True)
    for number in range(2 * len(splits)):
        image_id = 390000 + number
        file = f"COCO_train2014_{image_id:012d}.jpg"
        (pictures / file).write_bytes(encoded(picture(3000 + number)))
        images.append({"id": image_id, "file_name": file, "height": HEIGHT, "width": WIDTH, "license": 1})
        for n, box in enumerate(((8, 12, 47, 70), (60, 20, 110, 80))):
            annotation = 10 * image_id + n
            annotations.append(
                {
                    "id": annotation,
                    "image_id": image_id,
                    "segmentation": [polygon(*box)],
                    "bbox": [box[0], box[1], box[2] - box[0] + 1, box[3] - box[1] + 1],
                    "category_id": 1,
                    "iscrowd": 0,
                }
            )
            references.append(
                {
                    "ref_id": annotation,
                    "ann_id": annotation,
                    "image_id": image_id,
                    "category_id": 1,
                    "split": splits[number // 2],
                    "file_name": f"COCO_train2014_{image_id:012d}_{n}.jpg",
                    "sent_ids": [2 * annotation, 2 * annotation + 1],
                    "sentences": [
                        {"sent_id": 2 * annotation + s, "sent": text, "raw": text.title(), "tokens": text.split()}
                        for s, text in enumerate((f"the {['left', 'right'][n]} one", f"thing {n} on the picture"))
                    ],
                }
            )
    (folder / name).mkdir()
    with (folder / name / f"refs({split_by}).p").open("wb") as file:
        pickle.dump(references, file, protocol=0)
    instances = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (folder / name / "instances.json").write_text(json.dumps(instances))
    return folder


def shape(label: str, x1: int, y1: int, x2: int, y2: int) -> dict[str, Any]:
    """A polygon of LISA's, whose edges belong to it."""
    corners = [[float(x1), float(y1)], [float(x2), float(y1)], [float(x2), float(y2)], [float(x1), float(y2)]]
    return {"label": label, "labels": [label], "shape_type": "polygon", "points": corners, "group_id": None}


def reason_seg(folder: Path) -> Path:
    """LISA's ReasonSeg: in val a hole that is ignored and a "flag", in train two sentences, in test no target."""
    content = {
        "train/100_a": (["what keeps one dry?", "the thing against rain"], [shape("target", 10, 10, 60, 50)]),
        "train/101_b": (["something to sit on"], [shape("target", 5, 30, 90, 80)]),
        "val/102_c": (
            ["the thing with a hole"],
            [shape("ignore", 30, 30, 49, 49), shape("target", 20, 20, 79, 69), shape("flag", 0, 0, 100, 90)],
        ),
        "test/103_d": (["the unicorn in the picture"], [shape("ignore", 3, 3, 8, 8)]),
        "test/104_e": (["the dog\u2019s caf\u00e9", "never asked in evaluation"], [shape("target", 40, 8, 99, 60)]),
    }
    for number, (stem, (texts, shapes)) in enumerate(content.items()):
        path = folder / stem
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".jpg").write_bytes(encoded(picture(4000 + number)))
        row = json.dumps({"text": texts, "is_sentence": True, "shapes": shapes}, ensure_ascii=False)
        path.with_suffix(".json").write_bytes(row.encode("cp1252"))
    return folder


def lines(folder: Path) -> Path:
    """A folder of one's own: a mask, instance masks, boxes with points, and a question without a target."""
    for place in ("images", "masks"):
        (folder / place).mkdir(parents=True)
    for n in range(4):
        (folder / f"images/{n}.jpg").write_bytes(encoded(picture(5000 + n)))
    for name, mask in {
        "one": rectangle(10, 10, 40, 40),
        "left": rectangle(4, 20, 30, 70),
        "right": rectangle(70, 20, 110, 70),
        "blurred": rectangle(0, 0, 5, 5),
    }.items():
        Image.fromarray(mask).save(folder / f"masks/{name}.png")
    located = [{"bbox_2d": [10, 20, 90, 80], "point_2d": [50, 60]}]
    train = [
        {"image": "images/0.jpg", "question": "the red mug", "mask": "masks/one.png", "ignore": "masks/blurred.png"},
        {"image": "images/1.jpg", "question": "both mugs", "masks": ["masks/left.png", "masks/right.png"]},
    ]
    val = [
        {"image": "images/2.jpg", "question": "the sofa", "objects": located, "id": "sofa", "instance": "seat"},
        {"image": "images/3.jpg", "question": "the unicorn", "masks": []},
    ]
    for split, rows in {"train": train, "val": val}.items():
        # A last line without its newline is a line.
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def coco_json(folder: Path, questions: bool = True) -> Path:
    """COCO's JSON: polygons, run lengths as a list, a crowd; with ``questions`` or without."""
    for split, first in {"train": 600, "val": 610}.items():
        (folder / f"{split}2017").mkdir(parents=True)
        images = []
        for n in range(2):
            file = f"{first + n:012d}.jpg"
            (folder / f"{split}2017" / file).write_bytes(encoded(picture(6000 + first + n)))
            url = f"http://images.cocodataset.org/{split}2017/{file}"
            images.append({"id": first + n, "file_name": file, "width": WIDTH, "height": HEIGHT, "coco_url": url})
        runs = np.flatnonzero(np.diff(rectangle(100, 50, 120, 90).T.reshape(-1).astype(int), prepend=0, append=0))
        counts = np.diff([0, *runs.tolist(), WIDTH * HEIGHT]).tolist()
        annotations = [
            {"id": 1, "image_id": first, "category_id": 7, "segmentation": [polygon(8, 8, 40, 40)], "iscrowd": 0},
            {"id": 2, "image_id": first, "category_id": 7, "segmentation": [polygon(60, 10, 90, 80)], "iscrowd": 0},
            {
                "id": 3,
                "image_id": first,
                "category_id": 7,
                "segmentation": {"counts": counts, "size": [HEIGHT, WIDTH]},
                "iscrowd": 1,
            },
            {"id": 4, "image_id": first + 1, "category_id": 9, "segmentation": [polygon(5, 5, 60, 60)], "iscrowd": 0},
        ]
        content: dict[str, Any] = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": 7, "name": "dog"}, {"id": 9, "name": "sofa"}],
        }
        if questions:
            content["questions"] = [
                {"image_id": first, "text": "both dogs", "annotation_ids": [1, 2], "ignored_ids": [3]},
                {"image_id": first + 1, "text": "the unicorn", "annotation_ids": []},
            ]
        (folder / "annotations").mkdir(exist_ok=True)
        (folder / f"annotations/instances_{split}2017.json").write_text(json.dumps(content))
    return folder


# The maker of each data set's source.
ALL = {
    "refCOCOg_9k_840": solution_parquet,
    "VisionReasoner_multi_object_7k_840": lambda folder: solution_parquet(folder, multiple=True),
    "ReasonSeg_hub": lambda folder: mask_parquet(mask_parquet(folder), split="train", first=2100),
    "refcoco": refer,
    "refcoco+": lambda folder: refer(folder, "refcoco+"),
    "refcocog": lambda folder: refer(folder, "refcocog", "umd", ("train", "val", "test")),
    "ReasonSeg": reason_seg,
    "own_lines": lines,
    "own_coco": coco_json,
}
