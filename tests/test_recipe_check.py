"""Before the first step: targets that the recipe cannot compare with are named."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import question_sources as sources
from PIL import Image

from segzero_jax import config as configs
from segzero_jax import job, rewards, train
from segzero_jax.answers import read_solution
from segzero_jax.config import Config, ConfigError, check_local_model
from segzero_jax.config.checks import check_answer_form
from segzero_jax.data import build
from segzero_jax.data.pipeline import DataError, Source, open_split, open_splits, questions
from segzero_jax.processor import Processor
from segzero_jax.prompt import WORDINGS
from segzero_jax.recipe_check import check_splits, check_targets
from segzero_jax.types import Example

ROOT = Path(__file__).parents[1]
MASKS = [["one"], [], ["one"], ["left", "right"], ["one"], ["one", "left", "right"], ["right"]]


def split(folder: Path, name: str = "own", masks: Sequence[list[str]] = MASKS, first: int = 0) -> Source:
    """A built set of one's own, a question for each list of masks, three about a picture, from the ``first`` one."""
    source = sources.lines(folder / f"{name}-source")
    left = Image.fromarray(sources.rectangle(4, 20, 30, 70))
    left.save(source / "masks/left.png")
    rows = [
        {"image": f"images/{first + n // 3}.jpg", "question": "mug", "id": f"q{n}"}
        | {"masks": [f"masks/{mask}.png" for mask in found]}
        for n, found in enumerate(masks)
    ]
    (source / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (source / "val.jsonl").unlink()
    assert build.main([name, f"--source={source}", f"--data-dir={folder}", "--workers=1"]) == 0
    return open_split(name, "train", folder)


@pytest.mark.parametrize("recipe", [name for name in rewards.RECIPES if name.startswith("seg_zero")])
def test_questions_that_a_recipe_cannot_compare_with_are_named_before_the_first_step(
    recipe: str, tmp_path: Path
) -> None:
    source = split(tmp_path)
    with pytest.raises(DataError) as caught:
        check_targets(source, recipe, tmp_path)
    assert str(caught.value) == (
        f"own/train: 3 of 7 questions have not exactly one object, which reward.recipe={recipe} compares with: "
        "q1 with 0, q3 with 2, q5 with 3; data.prompt=vision_reasoner with reward.recipe=vision_reasoner or sam_r1 "
        "takes any number of objects"
    )
    check_targets(split(tmp_path, "single", [["one"], ["left"]]), recipe, tmp_path)


@pytest.mark.parametrize("recipe", rewards.RECIPES)
@pytest.mark.parametrize("prompt", WORDINGS)
def test_a_recipe_is_refused_where_it_gives_less_than_all_for_the_answer_that_is_asked_for(
    prompt: str, recipe: str
) -> None:
    """The answer that each wording shows, in JSON's quotes; the toy wording shows none, its policy gives a list."""
    shown = WORDINGS["vision_reasoner" if prompt == "toy" else prompt].rpartition("i.e., ")[2].replace("'", '"')
    target = '[{"bbox_2d": [10,100,200,210], "point_2d": [30,110]}]'
    most = rewards.RECIPES[recipe].maxima
    earned = rewards.RECIPES[recipe].measure(shown, read_solution(target))
    full = all(earned[name] == most[name] for name in most if name.endswith("_format"))
    config = configs.replace(Config(), **{"data.prompt": prompt, "reward.recipe": recipe})
    with (
        contextlib.nullcontext() if full else pytest.raises(ConfigError, match=f"data.prompt={prompt}.*recipe={recipe}")
    ):
        check_answer_form(config)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_no_preset_is_refused(path: Path) -> None:
    preset = configs.load(path)
    check_answer_form(preset)
    check_local_model(preset)


def test_other_recipes_take_any_number_of_objects_and_read_no_record(tmp_path: Path) -> None:
    source = split(tmp_path)
    assert source.object_counts().tolist() == [len(example.objects) for example in source] == [1, 0, 1, 2, 1, 3, 1]
    source._rows = []
    for recipe in ("vision_reasoner", "sam_r1"):
        check_targets(source, recipe, tmp_path)


def test_objects_are_counted_once(tmp_path: Path) -> None:
    source = split(tmp_path)
    read: list[int] = []

    class Watched(list):
        def __getitem__(self, index: int) -> dict:  # type: ignore[override]
            read.append(index)
            return list.__getitem__(self, index)

    source._rows = Watched(source._rows[n] for n in range(3))
    for _ in range(2):
        with pytest.raises(DataError, match="q1 with 0"):
            check_targets(source, "seg_zero_soft", tmp_path)
    assert read == [0, 1, 2], "each record once for its questions, and not at all the second time"


def test_training_refuses_what_its_recipe_cannot_compare_with(tmp_path: Path) -> None:
    """But not in splits that are only evaluated."""
    split(tmp_path)
    split(tmp_path, "single", [["left"]], first=3)
    processor = Processor.load("toy", 56, "toy", 1000)

    def opened(**changes: Any) -> Sequence[Example]:
        config = configs.replace(Config(), **{"data.dir": str(tmp_path), "data.eval_splits": [], **changes})
        splits = open_splits(config.data.names, config.data.eval_splits, config.data.dir)
        check_splits(splits, config, processor)
        return questions(splits)

    strict = {"reward.recipe": "seg_zero_strict"}
    assert len(opened(**{"data.name": "own"})) == len(MASKS)
    with pytest.raises(DataError, match="q1 with 0"):
        opened(**{"data.name": "own", **strict})
    assert len(opened(**{"data.name": "single", "data.eval_splits": ["own/train"], **strict})) == 1
    assert len(opened(**{"data.name": "single,own"})) == 1 + len(MASKS)
    with pytest.raises(DataError, match=r"own/train: .*q1 with 0"):
        opened(**{"data.name": "single,own", **strict})


def test_questions_are_looked_at_before_weights_are_read(
    tmp_path: Path, data_dir: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(job, "load_hf", lambda *_, **__: pytest.fail("weights are read"))
    options = ["--rollout.max_prompt_tokens=20", "--reward.server=none", f"--data.dir={data_dir}"]
    assert train.main([*options, f"--run.dir={tmp_path / 'run'}"]) == 2
    assert (
        "toy/train: 2048 of 2048 prompts do not fit, expected at most max_prompt_tokens=20" in capsys.readouterr().err
    )
