"""COCO's compressed run-length encoding: the text form of masks in data sets, answers and files of a run."""


def decode_counts(counts: str) -> list[int]:
    """The lengths of a mask's runs, background first, in column order; the caller must refuse negative ones.

    Five bits per character, low bits first; from the fourth run on, the difference from the run two before.
    Source: cocodataset/cocoapi, ``common/maskApi.c``, rleFrString.

    Raises:
      ValueError: the text is not in that encoding.
    """
    runs: list[int] = []
    value = shift = 0
    for character in counts:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 40:
            raise ValueError(f"mask counts: expected COCO's compressed run lengths, got {counts[:40]!r}")
        value |= (bits & 0x1F) << shift
        shift += 5
        if bits & 0x20:
            continue
        if bits & 0x10:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    if shift:
        raise ValueError(f"mask counts: expected an end, cut off in the middle of a number: {counts[-40:]!r}")
    return runs
