"""COCO's compressed run lengths: the text in which a mask stands in data sets, answers and files of a run."""


def decode_counts(counts: str) -> list[int]:
    """The lengths of a mask's runs, of background first, in column order; a negative one is for the caller to refuse.

    Five bits a character, low ones first, and from the fourth run on less the last but one.
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
