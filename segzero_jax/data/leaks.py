"""Pictures of the training split that are also in an evaluation split: by name, by content, and by what they look like.

Names and content find a picture among sets that keep it as it was. Seg-Zero's training sets do not: their pictures are
squashed to 840 x 840 and their ids lead nowhere, so those are found by their fingerprint. Between splits of one set it
is not asked: whoever cut them knew the pictures, and those of one camera look the same without being so.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

# Bits of 256 that may differ between two versions of a picture (docs/data.md has what was measured).
_NEAR = 20
# A picture with fewer bits set, or fewer not set, is so flat that it looks like any other flat one.
_INFORMATIVE = 24
_BLOCK = 512


@dataclass(frozen=True)
class Leak:
    """A question of the training split whose picture is held out elsewhere.

    Attributes:
      row: of the training index.
      id: of the question.
      held_out: id of a question about that picture in the evaluation split.
      how: the picture was recognised: by name, file or looks.
      why: the same with what is this picture's own.
    """

    row: int
    id: str
    held_out: str
    how: str
    why: str


def find_leaks(train: pa.Table, held_out: pa.Table, one_set: bool) -> list[Leak]:
    """Questions of the index ``train`` about a picture that is in the index ``held_out``.

    Args:
      one_set: whether both are splits of one data set; then looks are not compared.
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
    """(row, row, bits that differ) of pictures that are near one another."""
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
    """The different fingerprints, uint64 [N, 4], and which of them each row has."""
    raw = np.frombuffer(b"".join(index["fingerprint"].to_pylist()), np.uint64).reshape(-1, 4)
    prints, of_row = np.unique(raw, axis=0, return_inverse=True)
    return prints, of_row.reshape(-1)
