"""The toy world on disk: a TensorFlow Datasets builder that needs no TensorFlow (array_record files, JPEG pictures).

The training split holds 2048 pictures with one question each, every evaluation split 256 (see ``scenes.py`` for what
they hold out). Coordinates are pixels of the stored picture, boxes inclusive.
"""

import io
import shutil
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from pycocotools import mask as coco_mask

from segzero_jax.data.scenes import SPLITS, make_example_scene
from segzero_jax.data.shards import disk_errors
from segzero_jax.file_lock import turn
from segzero_jax.local_path import local_path

SIZES = {split: 2048 if split == "train" else 256 for split in SPLITS}


class ToyShapes(tfds.core.GeneratorBasedBuilder):
    """Coloured shapes with referring and reasoning questions, generated from a seed.

    The version identifies the images and questions: it changes when ``scenes.py`` draws different ones.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "id": tfds.features.Text(),
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
            "question": tfds.features.Text(),
            "kind": tfds.features.Text(doc="attribute, relation, superlative or odd"),
            "objects": tfds.features.Sequence(
                {
                    "box": tfds.features.Tensor(shape=(4,), dtype=np.int32, doc="x1, y1, x2, y2, inclusive"),
                    "point": tfds.features.Tensor(shape=(2,), dtype=np.int32, doc="x, y"),
                }
            ),
            "mask": tfds.features.Text(doc="COCO compressed run lengths of the union of the objects"),
            "img_height": tfds.features.Scalar(dtype=np.int32),
            "img_width": tfds.features.Scalar(dtype=np.int32),
        }
        # In the order of generation, so that element i is scene i.
        return tfds.core.DatasetInfo(
            builder=self,
            description=" ".join((__doc__ or "").split()),
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[Any]]:
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        for index in range(SIZES[split]):
            yield index, toy_row(split, index)


def toy_row(split: str, index: int) -> dict[str, Any]:
    """Scene ``index`` of a split as a row of the data set."""
    scene, question = make_example_scene(split, index)
    answer = scene.objects[question.answer]
    picture = io.BytesIO()
    Image.fromarray(scene.image).save(picture, "JPEG", quality=92)
    return {
        "id": f"toy-{split}-{index:05d}",
        "image": io.BytesIO(picture.getvalue()),
        "question": question.text,
        "kind": question.kind,
        "objects": [{"box": np.array(answer.box, np.int32), "point": np.array(answer.point, np.int32)}],
        "mask": coco_mask.encode(np.asfortranarray(answer.mask.astype(np.uint8)))["counts"].decode(),
        "img_height": scene.image.shape[0],
        "img_width": scene.image.shape[1],
    }


def prepared_builder(data_dir: str | Path) -> ToyShapes:
    """The builder with its files in place, built now if they are missing.

    One rename moves the files into place once all are complete. Concurrent processes take turns, so that one builds and
    the others find the result.

    Raises:
      ConfigError: ``data_dir`` is a URL.
      OSError: ``data_dir`` cannot be written.
    """
    directory = local_path(data_dir, "data.dir", "the toy set is made on each machine")
    directory.mkdir(parents=True, exist_ok=True)
    with turn(directory / ".toy_shapes.lock"):
        builder = ToyShapes(data_dir=directory, file_format="array_record")
        if not builder.data_path.exists():
            for leftover in builder.data_path.parent.glob("incomplete.*"):  # Left by a killed build.
                shutil.rmtree(leftover)
            count = sum(SIZES.values())
            print(f"building the toy data set: {count} examples, about 20 s, into {builder.data_path}", file=sys.stderr)
            tfds.disable_progress_bar()
            # TFDS would announce a download of unknown size.
            with redirect_stdout(io.StringIO()), disk_errors():
                builder.download_and_prepare()
    return builder
