"""The toy world: every question has exactly the answer it claims, checked from pixels and words alone."""

import hashlib
import re
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import distance_transform_edt

from segzero_jax.data.scenes import (
    COLOURS,
    HELDOUT_PAIRS,
    HELDOUT_RELATION,
    KINDS,
    RELATIONS,
    SHAPES,
    SPLITS,
    Question,
    Scene,
    SceneObject,
    make_example_scene,
    sample_scene,
)
from segzero_jax.data.toy import ToyShapes

SCENE = st.tuples(st.sampled_from(SPLITS), st.integers(0, 10**6))


def centre(obj: SceneObject) -> tuple[float, float]:
    return (obj.box[0] + obj.box[2]) / 2, (obj.box[1] + obj.box[3]) / 2


def named(scene: Scene, words: str) -> list[SceneObject]:
    """The objects that a noun phrase such as "red circle", "circle" or "red shape" fits."""
    *colour, shape = words.split()
    fits = [o for o in scene.objects if shape in ("shape", o.shape)]
    return [o for o in fits if not colour or o.colour == colour[0]]


def related(scene: Scene, relation: str, reference: SceneObject) -> list[SceneObject]:
    """Objects whose centre lies in a relation's direction, by any distance: the unclear must not exist."""
    x, y = centre(reference)
    ahead = {
        "left of": lambda cx, cy: cx < x,
        "right of": lambda cx, cy: cx > x,
        "above": lambda cx, cy: cy < y,
        "below": lambda cx, cy: cy > y,
    }[relation]
    return [o for o in scene.objects if o is not reference and ahead(*centre(o))]


def extreme(objects: list[SceneObject], word: str) -> SceneObject:
    degree = {
        "largest": lambda o: o.mask.sum(),
        "smallest": lambda o: -int(o.mask.sum()),
        "leftmost": lambda o: -centre(o)[0],
        "rightmost": lambda o: centre(o)[0],
        "highest": lambda o: -centre(o)[1],
        "lowest": lambda o: centre(o)[1],
    }[word]
    return max(objects, key=degree)


def odd_one(scene: Scene) -> list[SceneObject]:
    """Objects that alone have their colour, or alone their shape, where all others agree in it."""
    found = []
    for obj in scene.objects:
        others = [o for o in scene.objects if o is not obj]
        for mine, theirs in ((obj.colour, {o.colour for o in others}), (obj.shape, {o.shape for o in others})):
            if len(theirs) == 1 and mine not in theirs:
                found.append(obj)
    return found


def answers(scene: Scene, question: Question) -> list[SceneObject]:
    """Every object that the question's words mean: an independent reading of the text."""
    text = question.text.removeprefix("the ")
    if question.kind == "odd":
        return odd_one(scene)
    if question.kind == "relation":
        match = re.fullmatch(rf"shape ({'|'.join(RELATIONS)}) the (.*)", text)
        assert match
        (reference,) = named(scene, match[2])
        return related(scene, match[1], reference)
    if question.kind == "superlative":
        word, noun = text.split()
        return [extreme(named(scene, noun), word)]
    return named(scene, text)


@given(SCENE)
@settings(max_examples=300)
def test_the_words_mean_exactly_the_answer(which: tuple[str, int]) -> None:
    scene, question = make_example_scene(*which)
    assert [id(o) for o in answers(scene, question)] == [id(scene.objects[question.answer])]


@given(SCENE)
@settings(max_examples=200)
def test_superlatives_and_relations_are_clear(which: tuple[str, int]) -> None:
    scene, question = make_example_scene(*which)
    answer = scene.objects[question.answer]
    word, *rest = question.text.removeprefix("the ").split()
    if question.kind == "superlative":
        rivals = [o for o in named(scene, rest[0]) if o is not answer]
        if word in ("largest", "smallest"):
            ratios = [max(a, b) / min(a, b) for a, b in ((o.mask.sum(), answer.mask.sum()) for o in rivals)]
            assert min(ratios) > 1.4
        else:
            axis = 0 if word in ("leftmost", "rightmost") else 1
            assert min(abs(centre(o)[axis] - centre(answer)[axis]) for o in rivals) >= 20
    if question.kind == "relation":
        relation, reference = re.fullmatch(r"the shape (.*) the (\w+ \w+)", question.text).groups()
        (at,) = named(scene, reference)
        axis = 0 if relation in ("left of", "right of") else 1
        assert all(abs(centre(o)[axis] - centre(at)[axis]) >= 20 for o in scene.objects if o is not at)


@given(SCENE)
@settings(max_examples=200)
def test_geometry(which: tuple[str, int]) -> None:
    scene, _ = make_example_scene(*which)
    height, width, channels = scene.image.shape
    assert scene.image.dtype == np.uint8
    assert channels == 3
    assert width != height
    assert {width, height} <= {192, 208, 224, 240, 256}
    assert sum(o.mask.astype(int) for o in scene.objects).max() == 1
    for obj in scene.objects:
        ys, xs = np.nonzero(obj.mask)
        assert obj.box == (xs.min(), ys.min(), xs.max(), ys.max())
        assert obj.mask.shape == (height, width)
        x, y = obj.point
        assert obj.mask[y, x]
        # Painted in its colour, over a background that no colour resembles.
        painted = scene.image[obj.mask].mean(0)
        nearest = min(COLOURS, key=lambda name: np.abs(painted - COLOURS[name]).sum())
        assert nearest == obj.colour


@given(SCENE)
@settings(max_examples=60)
def test_point_is_the_centre_of_the_largest_inscribed_circle(which: tuple[str, int]) -> None:
    scene, _ = make_example_scene(*which)
    for obj in scene.objects:
        depth = distance_transform_edt(np.pad(obj.mask, 1))[1:-1, 1:-1]
        assert depth[obj.point[::-1]] >= depth.max() - 1.5


@given(SCENE)
@settings(max_examples=200)
def test_reasoning_is_true_short_and_ends_with_the_answer(which: tuple[str, int]) -> None:
    scene, question = make_example_scene(*which)
    height, width = scene.image.shape[:2]
    answer = scene.objects[question.answer]
    where = "(?:top|bottom)(?: left| right)?|left|right|middle"
    places = re.findall(rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) at ({where})", question.reasoning)
    assert places[-1][:2] == (answer.colour, answer.shape)
    assert question.reasoning.endswith(places[-1][2])
    assert len(question.reasoning.split()) <= 14
    for colour, shape, place in places:
        x, y = centre(next(o for o in scene.objects if (o.colour, o.shape) == (colour, shape)))
        expected = [
            w for w in (("top", "", "bottom")[int(3 * y // height)], ("left", "", "right")[int(3 * x // width)]) if w
        ]
        assert place == (" ".join(expected) or "middle")
    if question.kind == "relation":
        relation = next(r for r in RELATIONS if f" {r} " in question.text)
        assert f" is {RELATIONS[relation]} " in question.reasoning
    if question.kind == "odd":
        common = re.match(r"others are (\w+), odd is ", question.reasoning)[1]
        others = [o for o in scene.objects if o is not answer]
        assert all(common in (o.colour, f"{o.shape}s") for o in others)
        assert common not in (answer.colour, f"{answer.shape}s")


def test_splits_hold_out_what_they_say() -> None:
    for split in SPLITS:
        kinds = set()
        for index in range(250):
            scene, question = make_example_scene(split, index)
            kinds.add(question.kind)
            answer = scene.objects[question.answer]
            pairs = [(o.colour, o.shape) for o in scene.objects if split != "heldout_pairs" or o is not answer]
            assert not set(pairs) & set(HELDOUT_PAIRS)
            assert ((answer.colour, answer.shape) in HELDOUT_PAIRS) == (split == "heldout_pairs")
            assert (HELDOUT_RELATION in question.text) == (split == "heldout_relations")
            assert len(scene.objects) in (range(5, 8) if split == "heldout_crowd" else range(1, 5))
        assert kinds == ({"relation"} if split == "heldout_relations" else set(KINDS))


def test_training_reasoning_names_the_held_out_relation() -> None:
    reasonings = [make_example_scene("train", index)[1].reasoning for index in range(200)]
    assert sum(HELDOUT_RELATION in r for r in reasonings) > 5


def test_same_seed_same_bytes_and_splits_differ() -> None:
    (first, question), (again, same) = make_example_scene("val", 7), make_example_scene("val", 7)
    assert first.image.tobytes() == again.image.tobytes()
    assert question == same
    others = [make_example_scene("train", 7), make_example_scene("val", 8), make_example_scene("val", 7, seed=1)]
    assert all(other.image.tobytes() != first.image.tobytes() for other, _ in others)
    rng = np.random.default_rng(3)
    assert sample_scene("train", rng)[0].image.tobytes() != sample_scene("train", rng)[0].image.tobytes()


def test_the_stored_version_stands_for_these_scenes() -> None:
    """Change what is drawn and the version must rise with this digest, or files built before would pass for new."""
    made = []
    for split in SPLITS:
        for index in range(20):
            scene, question = make_example_scene(split, index)
            made.append((question, scene.image.shape, [(o.colour, o.shape, o.box, o.point) for o in scene.objects]))
    digest = hashlib.sha256(repr(made).encode()).hexdigest()[:16]
    assert (str(ToyShapes.VERSION), digest) == ("1.0.0", "de20b7e5fad4d620")


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="split 'test': expected one of train, val"):
        make_example_scene("test", 0)


def test_a_scene_takes_milliseconds() -> None:
    start = time.process_time()
    for index in range(200):
        make_example_scene(SPLITS[index % len(SPLITS)], index)
    assert (time.process_time() - start) / 200 < 0.01
