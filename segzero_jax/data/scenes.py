"""The toy world: images of coloured shapes, and questions with exactly one answer.

A *scene* is an image with its objects; a *question* refers to one of them by attribute ("the red circle"), relation
("the shape left of the blue square"), superlative ("the largest shape") or as the odd one out. Everything is drawn from
a ``numpy.random.Generator``: the same seed gives the same bytes.

Three things are held out of training, one per split: some colour-shape pairs never appear, one relation word is never
asked (its converse is, and the reasoning of those questions contains the word), and there are never more than four
objects.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 45, 45),
    "green": (45, 180, 60),
    "blue": (55, 80, 230),
    "yellow": (230, 215, 45),
    "white": (238, 238, 238),
    "purple": (165, 65, 200),
}
SHAPES = ("circle", "square", "triangle")
RELATIONS = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
SUPERLATIVES = ("largest", "smallest", "leftmost", "rightmost", "highest", "lowest")
KINDS = ("attribute", "relation", "superlative", "odd")
SPLITS = ("train", "val", "heldout_pairs", "heldout_relations", "heldout_crowd")

HELDOUT_PAIRS = (("blue", "circle"), ("yellow", "triangle"), ("red", "square"))
HELDOUT_RELATION = "below"
TRAIN_PAIRS = tuple((c, s) for c in COLOURS for s in SHAPES if (c, s) not in HELDOUT_PAIRS)

_SIDES = (192, 208, 224, 240, 256)
_KIND_SHARES = (0.4, 0.25, 0.2, 0.15)
_GAP = 4
# A clear difference: centres this many pixels apart, areas this many times larger.
_CLEAR_PIXELS = 20
_CLEAR_AREA = 1.5


@dataclass(frozen=True)
class SceneObject:
    """One shape.

    Attributes:
      colour, shape: names of its colour and shape.
      mask: bool [H, W], True on its pixels.
      box: inclusive pixel bounds (x1, y1, x2, y2).
      point: the centre (x, y) of its largest inscribed circle, a pixel of the mask.
    """

    colour: str
    shape: str
    mask: np.ndarray
    box: tuple[int, int, int, int]
    point: tuple[int, int]


@dataclass(frozen=True)
class Scene:
    """An image, uint8 [H, W, 3], and its objects, which never overlap."""

    image: np.ndarray
    objects: tuple[SceneObject, ...]


@dataclass(frozen=True)
class Question:
    """A question about a scene.

    Attributes:
      kind: one of KINDS.
      text: the question, such as "the shape left of the blue square".
      answer: index of the one object that it refers to.
      reasoning: a short true sentence that ends with the answer's name and place; used only by the warm start.
    """

    kind: str
    text: str
    answer: int
    reasoning: str


@dataclass(frozen=True)
class _Spot:
    """A shape before it is painted: its names, centre and half extent in pixels."""

    colour: str
    shape: str
    x: int
    y: int
    r: int

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def area(self) -> float:
        return {"circle": np.pi, "square": 4.0, "triangle": 2.0}[self.shape] * self.r**2


def make_example_scene(split: str, index: int, seed: int = 0) -> tuple[Scene, Question]:
    """Scene and question number ``index`` of a split; raises ValueError for an unknown split."""
    return sample_scene(split, np.random.default_rng([seed, _split_number(split), index]))


def sample_scene(split: str, rng: np.random.Generator) -> tuple[Scene, Question]:
    """Draws a scene and a question about it from a split's distribution ("train" is endless this way)."""
    _split_number(split)
    width, height = (int(v) for v in rng.choice(_SIDES, 2, replace=False))
    kind = "relation" if split == "heldout_relations" else str(rng.choice(KINDS, p=_KIND_SHARES))
    while True:
        spots = _place(_choose_pairs(split, kind, rng), width, height, rng)
        question = _ask(split, kind, spots, width, height, rng) if spots else None
        if question is not None:
            return _paint(spots, width, height, rng), question


def sample_lesson(count: int, easy: bool, rng: np.random.Generator) -> tuple[Scene, list[Question]]:
    """A training scene with ``count`` questions, drawn with replacement; an ``easy`` one shows one or two objects."""
    width, height = (int(v) for v in rng.choice(_SIDES, 2, replace=False))
    while True:
        kind = "attribute" if easy else str(rng.choice(KINDS, p=_KIND_SHARES))
        pairs = _choose_pairs("train", kind, rng)
        spots = _place(pairs[: rng.integers(1, 3)] if easy else pairs, width, height, rng)
        asked = (
            [_ask("train", str(k), spots, width, height, rng) for k in (kind, *rng.choice(KINDS[:3], count))]
            if spots
            else []
        )
        found = [question for question in asked if question is not None]
        if found:
            return _paint(spots, width, height, rng), [found[i % len(found)] for i in range(count)]


def _split_number(split: str) -> int:
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: expected one of {', '.join(SPLITS)}")
    return SPLITS.index(split)


def _choose_pairs(split: str, kind: str, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Colours and shapes of a scene; the first is the held-out pair or the odd one, if there is one."""
    first = HELDOUT_PAIRS[rng.integers(len(HELDOUT_PAIRS))] if split == "heldout_pairs" else None
    if kind == "odd":
        count = int(rng.integers(5, 8)) if split == "heldout_crowd" else 4
        colour, shape = odd = first or TRAIN_PAIRS[rng.integers(len(TRAIN_PAIRS))]
        by_colour = rng.integers(2)
        others = [p for p in TRAIN_PAIRS if p != odd and (p[1] == shape if by_colour else p[0] == colour)]
        return [odd] + [others[rng.integers(len(others))]] * (count - 1)
    fewest = 1 if kind == "attribute" else 2
    count = int(rng.integers(5, 8)) if split == "heldout_crowd" else int(rng.integers(fewest, 5))
    chosen = [TRAIN_PAIRS[i] for i in rng.choice(len(TRAIN_PAIRS), count, replace=False)]
    return [first, *chosen[1:]] if first else chosen


def _place(pairs: list[tuple[str, str]], width: int, height: int, rng: np.random.Generator) -> list[_Spot]:
    """Places every shape so that bounding boxes do not touch; an empty list if there is no room."""
    smallest, largest = (16, 42) if len(pairs) <= 4 else (13, 26)
    spots: list[_Spot] = []
    for colour, shape in pairs:
        for _ in range(30):
            r = int(rng.integers(smallest, largest + 1))
            x, y = int(rng.integers(r + 2, width - r - 2)), int(rng.integers(r + 2, height - r - 2))
            if all(max(abs(x - s.x), abs(y - s.y)) > r + s.r + _GAP for s in spots):
                spots.append(_Spot(colour, shape, x, y, r))
                break
        else:
            return []
    return spots


def _ask(
    split: str, kind: str, spots: list[_Spot], width: int, height: int, rng: np.random.Generator
) -> Question | None:
    """A question of this kind with exactly one answer, or None when the scene allows none."""
    find = {"attribute": _attributes, "relation": _relations, "superlative": _superlatives, "odd": _odd}[kind]
    found = find(spots, [f"{spot.name} at {_place_name(spot, width, height)}" for spot in spots])
    if split == "heldout_pairs":
        found = [q for q in found if q.answer == 0]
    found = [q for q in found if (HELDOUT_RELATION in q.text) == (split == "heldout_relations")]
    return found[rng.integers(len(found))] if found else None


def _attributes(spots: list[_Spot], seen: list[str]) -> list[Question]:
    """Questions by name; ``seen[i]`` is object i's name and place, for the reasoning."""
    found = []
    for i, spot in enumerate(spots):
        others = spots[:i] + spots[i + 1 :]
        texts = [f"the {spot.name}"] * 2  # The full name is the usual question.
        if all(o.colour != spot.colour for o in others):
            texts.append(f"the {spot.colour} shape")
        if all(o.shape != spot.shape for o in others):
            texts.append(f"the {spot.shape}")
        found += [Question("attribute", text, i, seen[i]) for text in texts]
    return found


def _relations(spots: list[_Spot], seen: list[str]) -> list[Question]:
    """Questions by relation to a named object, where one object clearly has that relation and no other has it."""
    found = []
    for i, reference in enumerate(spots):
        for relation, converse in RELATIONS.items():
            offsets = {k: _along(relation, s, reference) for k, s in enumerate(spots) if k != i}
            matching = [k for k, offset in offsets.items() if offset >= _CLEAR_PIXELS]
            if len(matching) == 1 and all(abs(offset) >= _CLEAR_PIXELS for offset in offsets.values()):
                reasoning = f"{seen[i]} is {converse} {seen[matching[0]]}"
                found.append(Question("relation", f"the shape {relation} the {reference.name}", matching[0], reasoning))
    return found


def _along(relation: str, spot: _Spot, reference: _Spot) -> int:
    """The distance of ``spot`` from ``reference`` in a relation's direction, in pixels."""
    return {
        "left of": reference.x - spot.x,
        "right of": spot.x - reference.x,
        "above": reference.y - spot.y,
        "below": spot.y - reference.y,
    }[relation]


def _superlatives(spots: list[_Spot], seen: list[str]) -> list[Question]:
    """Questions by size or place among all objects or those of one shape, where the winner clearly leads."""
    found = []
    for noun in ("shape", *SHAPES):
        members = [k for k, s in enumerate(spots) if noun in ("shape", s.shape)]
        if len(members) < 2:
            continue
        for word in SUPERLATIVES:
            (second, _), (best, answer) = sorted((_degree(word, spots[k]), k) for k in members)[-2:]
            if best - second >= (np.log(_CLEAR_AREA) if word in ("largest", "smallest") else _CLEAR_PIXELS):
                found.append(Question("superlative", f"the {word} {noun}", answer, f"{word} is {seen[answer]}"))
    return found


def _degree(word: str, spot: _Spot) -> float:
    """The degree to which a superlative fits: log area for size, pixels for place."""
    return {
        "largest": float(np.log(spot.area)),
        "smallest": float(-np.log(spot.area)),
        "leftmost": -spot.x,
        "rightmost": spot.x,
        "highest": -spot.y,
        "lowest": spot.y,
    }[word]


def _odd(spots: list[_Spot], seen: list[str]) -> list[Question]:
    """The question for the first object, which alone differs in colour or in shape."""
    odd, other = spots[:2]
    common = other.colour if odd.shape == other.shape else f"{other.shape}s"
    return [Question("odd", "the odd one out", 0, f"others are {common}, odd is {seen[0]}")]


def _place_name(spot: _Spot, width: int, height: int) -> str:
    """The place of a spot on a three by three grid: "top left", "bottom", "middle"."""
    row = ("top", "", "bottom")[3 * spot.y // height]
    column = ("left", "", "right")[3 * spot.x // width]
    return f"{row} {column}".strip() or "middle"


def _paint(spots: list[_Spot], width: int, height: int, rng: np.random.Generator) -> Scene:
    """Renders the shapes over a dark blotchy background, with pixel noise over all of it."""
    blotches = rng.integers(0, 70, (5, 5, 3), dtype=np.uint8) + rng.integers(0, 35, 3, dtype=np.uint8)
    canvas = np.asarray(Image.fromarray(blotches).resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    objects = []
    for spot in spots:
        top, left = spot.y - spot.r, spot.x - spot.r
        stamp = _stamp(spot.shape, spot.r)
        window = (slice(top, top + 2 * spot.r + 1), slice(left, left + 2 * spot.r + 1))
        canvas[window][stamp] = np.array(COLOURS[spot.colour]) + rng.integers(-15, 16, 3)
        mask = np.zeros((height, width), bool)
        mask[window] = stamp
        # The incircle of a triangle with base and height 2r has radius 2r / (1 + sqrt 5) and touches the base.
        drop = round(spot.r * (1 - 2 / (1 + 5**0.5))) if spot.shape == "triangle" else 0
        box = (left, top, left + 2 * spot.r, top + 2 * spot.r)
        objects.append(SceneObject(spot.colour, spot.shape, mask, box, (spot.x, spot.y + drop)))
    canvas += rng.integers(-12, 13, canvas.shape, dtype=np.int8)
    return Scene(canvas.clip(0, 255).astype(np.uint8), tuple(objects))


def _stamp(shape: str, r: int) -> np.ndarray:
    """The shape's mask in its own box, bool [2r + 1, 2r + 1]; it touches all four sides."""
    y, x = np.mgrid[-r : r + 1, -r : r + 1]
    if shape == "circle":
        return x**2 + y**2 <= r**2
    if shape == "square":
        return np.ones_like(x, bool)
    return 2 * abs(x) <= y + r
