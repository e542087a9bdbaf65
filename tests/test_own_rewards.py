"""Rewards of one's own: how functions are found, what they see, what they add, and what becomes of their mistakes."""

import hashlib
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_scoring import BROKEN, FRAME, GOOD, TARGET, Answered, example, scored
from thread_pod import on_hosts

from segzero_jax import own_rewards, rewards
from segzero_jax.config import Config, ConfigError, RewardConfig
from segzero_jax.own_rewards import Answer, check_same_files, load_functions, measure, sources
from segzero_jax.record import metric_keys
from segzero_jax.scoring import Scorer
from segzero_jax.types import Lengths

MODULE = """
import functools

import numpy as np

seen = []

def short(answer):
    return 0.5 * (len(answer.text) < 60)

def seen_by(answer):
    seen.append(answer)
    return True

def wrong(answer):
    return {"a": 1}[answer.text]

def nothing(answer):
    return float("nan")

accuracy = mean = short
number = 3
numpy_says = lambda answer: [np.float32(0.5), np.True_, np.int64(2)][int(answer.text)]
better = functools.partial(numpy_says)

class Kept:
    def __call__(self, answer):
        return 1

kept = Kept()
cached = functools.cache(short)
built_in = hash
"""


LENGTHS = Lengths(np.array([[7, 9]]), np.array([[True, False]]))


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"rewards_of_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_what_functions_give_is_added_under_their_names(module: str) -> None:
    functions = load_functions([f"{module}:short", f"{module}:seen_by"])
    with_them, without = (
        Scorer(RewardConfig(), FRAME, Answered([scored(0.75), scored(0.5)]), functions=chosen)
        .send([example(TARGET)], [[GOOD, BROKEN]], lengths=LENGTHS)
        .result()
        for chosen in (functions, {})
    )
    for g, text in enumerate((GOOD, BROKEN)):
        own = {"short": 0.5 * (len(text) < 60), "seen_by": 1.0}
        assert with_them.components[0][g] == without.components[0][g] | own
        assert with_them.rewards_bg[0, g] == without.rewards_bg[0, g] + sum(own.values())
    first, second = functions["seen_by"].__globals__["seen"]
    assert first == Answer(GOOD, example(TARGET), (TARGET,), 0.75, 7, True), "objects in pixels of the stored picture"
    assert (second.text, second.objects, second.mask_iou) == (BROKEN, (), 0.0)
    assert (second.tokens, second.finished) == (9, False)


def test_where_a_score_is_missing_nobody_is_asked(module: str) -> None:
    functions = load_functions([f"{module}:seen_by"])
    scorer = Scorer(RewardConfig(), FRAME, Answered([scored(None, "away"), scored(0.5)]), functions=functions)
    result = scorer.send([example(TARGET)], [[GOOD, GOOD]], lengths=LENGTHS).result()
    assert math.isnan(result.rewards_bg[0, 0])
    assert len(functions["seen_by"].__globals__["seen"]) == 1
    unweighted = RewardConfig(mask_iou_weight=0)
    scorer = Scorer(unweighted, FRAME, Answered([scored(None, "away"), scored(0.5)]), functions=functions)
    result = scorer.send([example(TARGET)], [[GOOD, GOOD]], lengths=LENGTHS).result()
    assert np.isnan(result.rewards_bg).tolist() == [[True, False]]
    assert [answer.mask_iou for answer in functions["seen_by"].__globals__["seen"]] == [0.5, 0.5]
    text_alone = Scorer(RewardConfig(server="none"), FRAME, None, functions=functions)
    assert text_alone.send([example(TARGET)], [[GOOD]], lengths=LENGTHS).result().components[0][0]["seen_by"] == 1


def test_their_names_are_keys_of_every_line(module: str) -> None:
    run = replace(Config(), reward=RewardConfig(functions=(f"{module}:short", "a.b:c")))
    assert set(metric_keys(run)) - set(metric_keys(Config())) == {"reward/short", "reward/c"}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("short", "'short': expected module:function"),
        ("{}:", "expected module:function"),
        ("{}:a.b", "expected module:function"),
        ("nowhere_at_all:short", "there is no module nowhere_at_all; run the command in the folder"),
        ("{}.deeper:short", "there is no module {}.deeper"),
        ("{}.py:short", "'{0}.py:short': expected module:function, such as {0}:short"),
        ("own/{}.py:short", "expected module:function, such as {}:short"),
        ("{}:absent", "has no function absent"),
        ("{}:number", "has no function number"),
        ("{}:accuracy", "another number is called accuracy"),
        ("{}:mean", "another number is called mean"),
        (".{}:short", "expected module:function"),
    ],
)
def test_what_cannot_be_called_is_one_line(module: str, name: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_functions([name.format(module)], rewards.component_names("vision_reasoner", True))
    assert str(error.value).startswith("reward.functions: ")
    assert said.format(module) in str(error.value)
    assert "\n" not in str(error.value)


def test_one_name_is_one_function(module: str) -> None:
    with pytest.raises(ConfigError, match="another number is called short"):
        load_functions([f"{module}:short", f"{module}:short"])


def test_a_module_that_lacks_a_module_says_so_itself(module: str, tmp_path: Path) -> None:
    (tmp_path / f"{module}_2.py").write_text("import not_installed_here")
    with pytest.raises(ModuleNotFoundError, match="not_installed_here"):
        load_functions([f"{module}_2:short"])


def test_a_mistake_keeps_its_traceback_and_names_the_answer(module: str) -> None:
    functions = load_functions([f"{module}:wrong"])
    with pytest.raises(KeyError) as error:
        measure(functions, Answer("hm", example(TARGET), (), None, 1, True))
    assert error.value.__notes__ == ["in reward function wrong, question row-1, answer 'hm'"]
    where = "reward function nothing, question row-1, answer 'hm'"
    with pytest.raises(ValueError, match=f"{where}: expected a finite number, got nan"):
        measure(load_functions([f"{module}:nothing"]), Answer("hm", example(TARGET), (), None, 1, True))


def test_numbers_of_numpy_are_numbers(module: str) -> None:
    functions = load_functions([f"{module}:numpy_says"])
    for text, value in (("0", 0.5), ("1", 1.0), ("2", 2.0)):
        measured = measure(functions, Answer(text, example(TARGET), (), None, 1, True))["numpy_says"]
        assert (measured, type(measured)) == (value, float)


def test_a_function_is_known_by_its_file(module: str, tmp_path: Path) -> None:
    names = ("short", "better", "kept", "cached")
    found = sources(load_functions([f"{module}:{name}" for name in (*names, "built_in")]))
    assert found == dict.fromkeys(names, hashlib.sha256((tmp_path / f"{module}.py").read_bytes()).hexdigest())


def test_hosts_that_would_score_by_other_files_are_refused() -> None:
    for end in on_hosts(3, lambda pod: check_same_files({"short": "ab" if pod.index < 2 else "cd"}, pod)):
        with pytest.raises(ConfigError, match=r"the file of short on host 2 \(w-2\) is not that on host 0 \(w-0\)"):
            end.result()
    for same in ({}, {"short": "ab"}):
        assert [end.result() for end in on_hosts(3, lambda pod, same=same: check_same_files(same, pod))] == [None] * 3


def test_the_run_s_own_numbers_are_no_names_for_functions() -> None:
    measured = {key.removeprefix("reward/") for key in metric_keys(Config()) if key.startswith("reward/")}
    assert measured - set(rewards.component_names("vision_reasoner", True)) == set(own_rewards._MEASURED)
