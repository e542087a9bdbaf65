"""Finds images of the training split that are also in an evaluation split: by name, by content, and by fingerprint.

Name and content find an image in sets that keep it unchanged. Seg-Zero's training sets do not: their images are
squashed to 840 x 840 and their ids are unrelated to the originals, so fingerprints are compared. Between splits of one
set they are not: the authors of the splits knew the images, and different images of one camera look the same.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

# Bits of 256 that may differ between two versions of an image (docs/data.md has the measurements).
_NEAR = 20
# An image with fewer bits set, or fewer not set, is so flat that it matches any other flat image.
_INFORMATIVE = 24
_BLOCK = 512


@dataclass(frozen=True)
class Leak:
    """A question of the training split whose image is held out elsewhere.

    Attributes:
      row: row in the training index.
      id: id of the question.
      held_out: id of a question about that image in the evaluation split.
      how: how the image was recognised: by name, file or looks.
      why: ``how``, with the details of this image.
    """

    row: int
    id: str
    held_out: str
    how: str
    why: str


def find_leaks(train: pa.Table, held_out: pa.Table, one_set: bool) -> list[Leak]:
    """Questions of the index ``train`` about an image that is in the index ``held_out``.

    Args:
      one_set: whether both are splits of one data set; then fingerprints are not compared.
    """
    leaks: dict[int, Leak] = {}
    ids, others = train["id"].to_pylist(), held_out["id"].to_pylist()

    def note(row: int, other: int, how: str, own: str = "") -> None:
        leaks.setdefault(row, Leak(row, ids[row], others[other], how, how + own))

    for column, how in (("image_id", "same name"), ("image_sha256", "same file")):
        places = {value: place for place, value in enumerate(held_out[column].to_pylist())}
        for row, value in enumerate(train[column].to_pylist()):
            if value in places:
                note(row, places[value], how, f", {value}" if column == "image_id" else "")
    for row, other, distance in [] if one_set else _look_alikes(train, held_out):
        note(row, other, "looks the same", f", {distance} of 256 bits differ")
    return [leaks[row] for row in sorted(leaks)]


def _look_alikes(train: pa.Table, held_out: pa.Table) -> list[tuple[int, int, int]]:
    """(training row, held-out row, differing bits) of images with similar fingerprints."""
    prints, of_row = _prints(train)
    others, of_other = _prints(held_out)
    first = {int(print_): row for row, print_ in reversed(list(enumerate(of_other)))}
    nearest = np.full(len(prints), 257)
    which = np.zeros(len(prints), int)
    for start in range(0, len(others), _BLOCK):
        block = others[start : start + _BLOCK]
        for begin in range(0, len(prints), _BLOCK):
            part = slice(begin, begin + _BLOCK)
            apart = np.bitwise_count(prints[part, None] ^ block[None]).sum(axis=-1, dtype=np.int16)
            least = apart.argmin(axis=1)
            distance = apart[np.arange(len(least)), least]
            better = distance < nearest[part]
            nearest[part] = np.where(better, distance, nearest[part])
            which[part] = np.where(better, start + least, which[part])
    told = np.bitwise_count(prints).sum(axis=-1)
    near = (nearest <= _NEAR) & (told >= _INFORMATIVE) & (told <= 256 - _INFORMATIVE)
    return [(row, first[int(which[print_])], int(nearest[print_])) for row, print_ in enumerate(of_row) if near[print_]]


def _prints(index: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """The distinct fingerprints, uint64 [N, 4], and the index of each row's fingerprint."""
    raw = np.frombuffer(b"".join(index["fingerprint"].to_pylist()), np.uint64).reshape(-1, 4)
    prints, of_row = np.unique(raw, axis=0, return_inverse=True)
    return prints, of_row.reshape(-1)
