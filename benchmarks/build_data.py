"""How fast a data set is built, and whether memory grows with it.

    python benchmarks/build_data.py --rows 10000

Makes a source of made-up photographs in a temporary folder (not timed), builds it as a user would, and prints seconds,
questions a second, and the largest memory of any process; ``--rows`` a quarter as large shows whether that grows.

``refer`` is RefCOCO's form: JPEGs of 640 x 480, 3.3 questions each, polygons. ``parquet`` is that of refCOCOg_9k_840:
PNGs of 840 x 840, one question each, 1.2 MB a row.
"""

import argparse
import io
import json
import os
import pickle
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

_DIFFERENT = 40
_REFERENCES = ((1, 1), (2, 1), (2, 2), (1, 1))  # Objects of an image, sentences of each: 3.3 questions on average.


def photograph(seed: int, width: int, height: int) -> Image.Image:
    """A synthetic image with edges, gradients and grain, which takes as many bytes as a photograph."""
    rng = np.random.default_rng(seed)
    image = np.zeros((height, width, 3), np.float32)
    for cells, weight in ((4, 110), (24, 60), (120, 35)):
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        image += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float32) / 255 * weight
    image += rng.normal(0, 5, image.shape)
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def refer_source(folder: Path, rows: int) -> None:
    """Writes a source in RefCOCO's form; its images are links to a few distinct ones."""
    pictures = [encoded(photograph(seed, 640, 480), "JPEG", quality=90) for seed in range(_DIFFERENT)]
    (folder / "train2014").mkdir()
    (folder / "refcoco").mkdir()
    for number, data in enumerate(pictures):
        (folder / f"{number}.jpg").write_bytes(data)
    images, annotations, references = [], [], []
    rng = np.random.default_rng(0)
    sentences = image = 0
    while sentences < rows:
        file = f"COCO_train2014_{image:012d}.jpg"
        os.link(folder / f"{image % _DIFFERENT}.jpg", folder / "train2014" / file)
        images.append({"id": image, "file_name": file, "height": 480, "width": 640})
        objects, each = _REFERENCES[image % len(_REFERENCES)]
        for _ in range(objects):
            x, y = rng.integers(120, 520), rng.integers(120, 360)
            turn = np.linspace(0, 2 * np.pi, 40, endpoint=False)
            radius = rng.uniform(40, 110, 40)
            outline = np.stack([x + radius * np.cos(turn), y + radius * np.sin(turn)], axis=1)
            own = len(annotations)
            annotations.append({"id": own, "image_id": image, "segmentation": [outline.reshape(-1).round(2).tolist()]})
            asked = [
                {"sent_id": sentences + n, "sent": f"thing {sentences + n}"}
                for n in range(min(each + 1, rows - sentences))
            ]
            sentences += len(asked)
            references.append({"ref_id": own, "ann_id": own, "image_id": image, "split": "train", "sentences": asked})
        image += 1
    (folder / "refcoco/instances.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    with (folder / "refcoco/refs(unc).p").open("wb") as out:
        pickle.dump(references, out)


def parquet_source(folder: Path, rows: int) -> None:
    """Writes a source in refCOCOg_9k_840's form, in row groups of 100 as on the hub."""
    pictures = [encoded(photograph(seed, 840, 840), "PNG") for seed in range(_DIFFERENT)]
    writer = None
    for start in range(0, rows, 100):
        numbers = range(start, min(start + 100, rows))
        table = pa.table(
            {
                "id": [f"refcocog_{n}" for n in numbers],
                "problem": [f"thing {n}" for n in numbers],
                "solution": ["<box>(100,200),(400,600)</box><points>(200,300),(300,444)</points>"] * len(numbers),
                "image": [{"bytes": pictures[n % _DIFFERENT], "path": None} for n in numbers],
                "img_height": [480] * len(numbers),
                "img_width": [640] * len(numbers),
            }
        )
        writer = writer or pq.ParquetWriter(folder / "train-00000-of-00001.parquet", table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--form", choices=("refer", "parquet"), default="refer")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / "source"
        source.mkdir()
        (refer_source if args.form == "refer" else parquet_source)(source, args.rows)
        command = [sys.executable, "-m", "segzero_jax.data.build", "refcoco", f"--source={source}"]
        command += [f"--data-dir={temporary}/built", f"--workers={args.workers}"]
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        built = sum(path.stat().st_size for path in Path(temporary, "built").rglob("*") if path.is_file())
    used = _children()
    print(f"{args.form}: {args.rows} questions in {seconds:.1f} s, {args.rows / seconds:.0f} a second")
    print(f"CPU: {used[1]:.1f} s in all; largest process: {used[0]:.0f} MiB; built: {built / 2**20:.0f} MiB")


def _children() -> tuple[float, float]:
    """Peak MiB of the largest ended process, its own children included, and the CPU seconds of all."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_maxrss / 1024, usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
