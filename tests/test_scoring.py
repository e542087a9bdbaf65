"""Responses to rewards: frames, missing scores, answers that cannot be read."""

import math
from dataclasses import replace

import numpy as np
import pytest
from thread_pod import on_hosts

from segzero_jax import config as configs
from segzero_jax import rewards
from segzero_jax.config import Config, RewardConfig
from segzero_jax.patience import Patience
from segzero_jax.pods import Pod
from segzero_jax.record import StepRecord, metric_keys, rollout_rows, step_metrics, unscored_groups, update_metrics
from segzero_jax.reward_messages import CandidateScore, ScoreRequest
from segzero_jax.scoring import Scored, Scorer, solution
from segzero_jax.types import Example, Frame, Lengths, ObjectPrompt, RleMask, Rollout
from segzero_jax.watch import CollapseWatch

FRAME = Frame(100, 100)
GOOD = '<think> there </think>\n<answer>[{"bbox_2d": [10,20,50,60], "point_2d": [30,40]}]</answer>'
BROKEN = "<think> there </think>\n<answer>[{'bbox_2d': [10,20,50,60]}]</answer>"


def example(*objects: ObjectPrompt) -> Example:
    return Example("row-1", b"", Frame(200, 400), "the thing", objects, None)


TARGET = ObjectPrompt((20.0, 80.0, 100.0, 240.0), ((60.0, 160.0),))  # GOOD's box and point in the stored picture


class Answered:
    """A client that says what it was asked and answers with given scores."""

    def __init__(self, scores: list[CandidateScore], asked: list[ScoreRequest] | None = None):
        self.scores = scores
        self.asked = asked or []
        self.drawn: list[str] = []
        self.waits: list[tuple[object, bool]] = []

    def score(self, groups: list[ScoreRequest], masks: int = 0) -> "Answered":
        self.asked += groups
        self.drawn += [group.id for group in groups[:masks]]
        sent = Answered(self.scores, list(groups))
        sent.waits = self.waits
        return sent

    def result(self, patience: object = None, drop: bool = False) -> list[list[CandidateScore]]:
        self.waits.append((patience, drop))
        return [self.scores for _ in self.asked]


def scored(iou: float | None, error: str = "") -> CandidateScore:
    return CandidateScore(iou, 0 if iou is None else round(100 * iou), 100, 0.5, None, error)


def test_targets_and_answers_change_frames() -> None:
    client = Answered([scored(0.5)])
    Scorer(RewardConfig(), FRAME, client).send([example(TARGET)], [[GOOD]])
    assert solution(example(TARGET), FRAME, "vision_reasoner") == '[{"bbox_2d": [10,20,50,60], "point_2d": [30,40]}]'
    two_points = example(ObjectPrompt(TARGET.box, ((60.0, 160.0), (40.0, 200.0))))
    both = "<box>(10,20),(50,60)</box><points>(30,40),(20,50)</points>"
    assert solution(two_points, FRAME, "seg_zero_strict") == both
    (request,) = client.asked
    assert request.candidates == ((TARGET,),)
    assert (request.frame, request.target) == (Frame(200, 400), (TARGET,))


def test_masks_come_back_for_the_first_prompts_alone() -> None:
    client = Answered([scored(0.5)])
    rows = [replace(example(TARGET), id=f"row-{i}") for i in range(3)]
    result = Scorer(RewardConfig(), FRAME, client).send(rows, [[GOOD]] * 3, masks=1).result()
    assert [request.id for request in client.asked] == ["row-0", "row-1", "row-2"]
    assert client.drawn == ["row-0"]
    assert result.masks == [[scored(0.5)]] * 3


def test_text_rewards_need_no_server() -> None:
    result = Scorer(RewardConfig(), FRAME, None).send([example(TARGET)], [[GOOD, BROKEN]]).result()
    text = solution(example(TARGET), FRAME, "vision_reasoner")
    assert result.rewards_bg.tolist() == [[rewards.score("vision_reasoner", t, text).total for t in (GOOD, BROKEN)]]
    assert result.rewards_bg[0, 0] == rewards.maximum("vision_reasoner")
    assert result.masks is None


@pytest.mark.parametrize(
    ("mode", "iou", "value"), [("raw", 0.25, 0.25), ("threshold", 0.75, 1.0), ("tiered", 0.75, 3.0)]
)
def test_mask_iou_is_a_component_in_its_mode_with_its_weight(mode: str, iou: float, value: float) -> None:
    config = RewardConfig(mask_iou_weight=2.0, mask_iou_mode=mode)
    result = Scorer(config, FRAME, Answered([scored(iou)])).send([example(TARGET)], [[GOOD]]).result()
    assert result.rewards_bg[0, 0] == rewards.maximum("vision_reasoner") + 2 * value
    assert result.components[0][0]["mask_iou"] == value


def test_a_missing_score_is_never_a_zero() -> None:
    client = Answered([scored(None, "the box is not finite"), scored(0.5)])
    result = Scorer(RewardConfig(), FRAME, client).send([example(TARGET)], [[GOOD, GOOD]]).result()
    assert np.isnan(result.rewards_bg[0, 0])
    assert np.isfinite(result.rewards_bg[0, 1])
    assert result.components[0][0] == {}
    numbers = step_metrics(step(result), Config())
    assert numbers["missing_scores"] == 1
    assert numbers["reward/mean"] == pytest.approx(result.rewards_bg[0, 1])
    assert numbers["mask_iou/mean"] == 0.5
    row, _ = rollout_rows(step(result), FRAME, "vision_reasoner", lambda *_: "images/row-1.jpg")
    assert (row["reward"], row["mask_iou"], row["error"]) == (None, None, "the box is not finite")
    refused = Answered([scored(None, "stumbled")])
    unreadable = Scorer(RewardConfig(), FRAME, refused).send([example(TARGET)], [[BROKEN]]).result()
    assert np.isnan(unreadable.rewards_bg).all()
    assert unreadable.components == [[{}]]


def test_a_point_outside_the_picture_earns_nothing_and_the_row_says_why() -> None:
    client = Answered([scored(0.0, "the point lies outside"), scored(0.5)])
    result = Scorer(RewardConfig(), FRAME, client).send([example(TARGET)], [[GOOD, GOOD]]).result()
    assert result.components[0][0]["mask_iou"] == 0.0
    assert step_metrics(step(result), Config())["missing_scores"] == 0
    row, _ = rollout_rows(step(result), FRAME, "vision_reasoner", lambda *_: "images/row-1.jpg")
    assert (row["mask_iou"], row["error"]) == (0.0, "the point lies outside")
    assert row["reward"] == rewards.maximum("vision_reasoner")


@pytest.mark.parametrize("drop", [False, True])
def test_scores_are_waited_for_as_long_as_the_run_says(drop: bool) -> None:
    client, patience = Answered([scored(0.5)]), Patience(RewardConfig(), print, lambda: True)
    Scorer(RewardConfig(), FRAME, client).send([example(TARGET)], [[GOOD]]).result(patience, drop)
    assert client.waits == [(patience, drop)]


def test_masks_of_the_data_are_what_the_server_compares_with() -> None:
    """The target's, rather than one that SAM 2 makes of its box; and pixels to ignore."""
    client = Answered([scored(0.5)])
    mask, ignore = RleMask(400, 200, "as it is"), RleMask(400, 200, "this too")
    Scorer(RewardConfig(), FRAME, client).send([replace(example(TARGET), mask=mask, ignore=ignore)], [[GOOD]])
    assert [(request.target, request.ignore) for request in client.asked] == [(mask, ignore)]


def test_an_unreadable_answer_does_not_earn_what_nothing_here_earns() -> None:
    client = Answered([scored(1.0), scored(1.0)])  # an empty mask equals an empty target
    texts = [[BROKEN, "<think> none </think>\n<answer>[]</answer>"]]
    result = Scorer(RewardConfig(), FRAME, client).send([example()], texts).result()
    assert [row["mask_iou"] for row in result.components[0]] == [0.0, 1.0]


def step(result: Scored) -> StepRecord:
    rollout = Rollout(np.zeros((1, 2, 4), int), np.array([[3, 4]]), np.zeros((1, 2, 4)), np.array([[True, False]]))
    return StepRecord(1, [example(TARGET)], [[GOOD, GOOD]], rollout, result, np.array([[0.0, 1.0]]))


def test_a_row_holds_what_a_picture_of_it_needs() -> None:
    result = Scorer(RewardConfig(), FRAME, Answered([scored(0.5)] * 2)).send([example(TARGET)], [[GOOD, GOOD]]).result()
    made = step(result)
    rows = list(rollout_rows(made, FRAME, "vision_reasoner", lambda name, data: f"images/{name}.jpg"))
    assert [(row["sample"], row["length"], row["finished"], row["advantage"]) for row in rows] == [
        (0, 3, True, 0.0),
        (1, 4, False, 1.0),
    ]
    assert rows[0]["image"] == "images/row-1.jpg"
    assert rows[0]["objects"] == rows[0]["target_objects"] == [{"box": list(TARGET.box), "points": [[60.0, 160.0]]}]
    numbers = step_metrics(made, Config())
    assert numbers["response_length/mean"] == 3.5
    assert numbers["finished"] == 0.5
    # By rewards, which are alike, not by the advantages of what was learnt from.
    assert numbers["reward/zero_std_groups"] == 1.0


@pytest.mark.parametrize("recipe", rewards.RECIPES)
def test_no_reasoning_is_missing_where_none_is_asked_for(recipe: str) -> None:
    """A run without reasoning measures none, has no such key to keep a best checkpoint by, and raises no alarm."""
    config = configs.replace(Config(), **{"reward.recipe": recipe, "watch.alarm_after": 2})
    bare = GOOD.partition("\n")[2]
    scorer = Scorer(config.reward, FRAME, Answered([scored(0.5), scored(0.5)]))
    result = scorer.send([example(TARGET)], [[bare, bare]]).result()
    numbers = step_metrics(step(result)._replace(texts=[[bare, bare]]), config)
    asked = recipe != "seg_zero_no_thinking"
    assert numbers.get("empty_thinking") == (1.0 if asked else None)
    assert ("empty_thinking" in numbers) == ("empty_thinking" in metric_keys(config)) == asked
    assert {f"reward/{name}" for name in result.components[0][0]} <= set(metric_keys(config))
    watch = CollapseWatch(config.watch)
    for _ in range(3):
        alarms = watch.look(numbers)
    assert alarms["alarm/empty_thinking"] == asked


def test_of_several_data_sets_each_has_its_own_reward() -> None:
    config = configs.replace(Config(), **{"data.name": "mugs , r,mugs,rare"})
    names = {"data/mugs/reward", "data/r/reward", "data/rare/reward"}
    assert {key for key in metric_keys(config) if key.startswith("data/")} == names
    rewards_bg = np.array([[1.0, 2.0], [5.0, np.nan], [3.0, 6.0], [np.nan, np.nan]])
    groups = [[{}, {}]] * 4
    rollout = Rollout(np.zeros((4, 2, 4), int), np.ones((4, 2), int), np.zeros((4, 2, 4)), np.ones((4, 2), bool))
    sets = ("mugs", "r", "mugs", "rare")
    asked = [replace(example(), id=f"{name}/{n}", data_set=name) for n, name in enumerate(sets)]
    made = StepRecord(1, asked, [[GOOD, GOOD]] * 4, rollout, Scored(rewards_bg, groups, None), np.zeros((4, 2)))
    numbers = step_metrics(made, config)
    assert {name: numbers[name] for name in names} == {
        "data/mugs/reward": 3.0,
        "data/r/reward": 5.0,
        "data/rare/reward": None,
    }
    assert not {key for key in step_metrics(made, Config()) if key.startswith("data/")}, "one set alone is the mean"


def test_the_numbers_and_rows_of_a_step() -> None:
    """A score that is missing is in no number, one of zero is; of the first prompt alone the picture is kept."""
    rewards_bg = np.array([[1.0, 2.0, 3.0], [4.0, 4.0, 4.0], [np.nan, np.nan, 6.0]])
    components = [[{"part": reward / 2} if np.isfinite(reward) else {} for reward in group] for group in rewards_bg]
    masks = [[scored(iou) for iou in group] for group in ([0.0, 0.5, 1.0], [0.5, 0.5, 0.5], [None, None, 0.0])]
    lengths, finished = np.array([[3, 7, 4], [2, 4, 4], [4, 4, 8]]), np.ones((3, 3), bool)
    made = StepRecord(
        1,
        [replace(example(), id=f"row-{n}") for n in range(3)],
        [["<think> so </think>", "<think> \n</think>", ""]] * 3,
        Rollout(np.zeros((3, 3, 9), int), lengths, np.zeros((3, 3, 9)), finished),
        Scored(rewards_bg, components, masks),
        np.arange(9.0).reshape(3, 3),
    )
    given = [1, 2, 3, 4, 4, 4, 6]
    assert step_metrics(made, Config()) == pytest.approx(
        {
            **{"reward/mean": np.mean(given), "reward/std": np.std(given), "reward/part": np.mean(given) / 2},
            **{"reward/zero_std_groups": 2 / 3, "missing_scores": 2, "mask_iou/mean": 3 / 7},
            **{"response_length/mean": 40 / 9, "response_length/min": 2, "response_length/max": 8},
            **{"empty_thinking": 2 / 3, "finished": 1},
        }
    )
    none = Scored(np.full((3, 3), np.nan), [[{}] * 3] * 3, [[scored(None)] * 3] * 3)
    numbers = step_metrics(made._replace(scored=none), Config())
    assert (numbers["reward/mean"], numbers["mask_iou/mean"]) == (None, None)
    stored: list[str] = []
    rows = list(rollout_rows(made, FRAME, "vision_reasoner", lambda name, data: stored.append(name) or name))
    assert stored == ["row-0"]
    assert ["image" in row for row in rows] == [True] * 3 + [False] * 6
    assert [row["advantage"] for row in rows] == list(range(9))
    assert [row["length"] for row in rows] == lengths.ravel().tolist()


def test_groups_without_any_score_are_told_with_the_reason_of_the_first() -> None:
    one, none = [scored(0.5), scored(None, "a box of no area")], [scored(None, "not a number"), scored(None, "other")]

    def told(*masks: list[CandidateScore]) -> str:
        rewards_bg = np.array([[np.nan if score.iou is None else score.iou for score in group] for group in masks])
        return unscored_groups(Scored(rewards_bg, [[{}, {}]] * len(masks), list(masks)))

    assert told(one, one) == ""
    assert told(one, none, one) == "1 of 3 groups are left out, they have no scores: not a number"
    assert told(none, none) == "this step makes no update, its groups have no scores: not a number"


def test_the_updates_of_a_step_are_one_line() -> None:
    good = {"loss": 1.0, "grad_norm": np.float32(3.0), "update/skipped": 0.0}
    bad = {"loss": math.nan, "grad_norm": np.float32(math.inf), "update/skipped": 1.0}
    assert update_metrics([good]) == good
    assert update_metrics([good, bad, {**good, "loss": 2.0}]) == {"loss": 1.5, "grad_norm": 3.0, "update/skipped": 1.0}
    assert update_metrics([bad, bad]) == {"loss": None, "grad_norm": None, "update/skipped": 2.0}
    overflown = {"loss": 0.1, "grad_norm": np.float32(math.inf), "update/skipped": np.float32(1.0)}
    assert update_metrics([good, overflown]) == {**good, "update/skipped": 1.0}
    assert update_metrics([overflown]) == {"loss": None, "grad_norm": None, "update/skipped": 1.0}
    assert update_metrics([]) == {}
    keys = lambda **changes: set(metric_keys(configs.replace(Config(), **changes)))  # noqa: E731
    assert keys() - keys(**{"grpo.kl_coef": 0.0}) == {"kl"}
    assert keys(**{"grpo.iterations": 2}) - keys() == {"kl_old"}
    masks = {"reward.server": "local"}
    assert keys(**masks) - keys(**masks, **{"reward.mask_iou_weight": 0.0}) == {"reward/mask_iou"}
    sampling = {"dynamic_sampling/batches", "dynamic_sampling/groups"}
    assert keys(**{"rollout.max_batches": 2}) - keys() == sampling


@pytest.mark.parametrize("rows", [None, [[0, 3], [1], [2, 4]]])
def test_hosts_score_their_shares_and_see_the_whole(rows: list[list[int]] | None) -> None:
    examples = [replace(example(TARGET), id=f"row-{n}") for n in range(5)]
    texts = [[GOOD, BROKEN] if n % 2 else [BROKEN, GOOD] for n in range(5)]
    mask = RleMask(1, 2, "02")
    scores = [replace(scored(1 / 3), mask=mask), scored(None, "refused")]
    clients = [Answered(scores) for _ in range(3)]

    def score(pod: Pod) -> Scored:
        scorer = Scorer(RewardConfig(), FRAME, clients[pod.index], pod, functions)
        own = rows[pod.index] if rows else None
        return scorer.send(examples, texts, masks=2, rows=own, lengths=lengths).result()

    lengths = Lengths(np.arange(10).reshape(5, 2), np.arange(10).reshape(5, 2) % 3 == 0)
    functions = {"length": lambda given: given.tokens + 0.5 * given.finished}
    found = [end.result() for end in on_hosts(3, score)]
    alone = Scorer(RewardConfig(), FRAME, Answered(scores), functions=functions)
    alone = alone.send(examples, texts, masks=2, lengths=lengths).result()
    assert [group[0]["length"] for group in alone.components] == [0.5, 2.0, 4.0, 6.5, 8.0]
    for whole in found:
        np.testing.assert_array_equal(whole.rewards_bg, alone.rewards_bg)
        assert whole.components == alone.components
        assert whole.masks == alone.masks
    asked = [[request.id for request in client.asked] for client in clients]
    shares = rows or [[0, 3], [1, 4], [2]]
    assert asked == [[f"row-{n}" for n in share] for share in shares]
    assert [client.drawn for client in clients] == [["row-0"], ["row-1"], []]


@pytest.mark.parametrize("recipe", [name for name in rewards.RECIPES if name.startswith("seg_zero")])
def test_a_target_that_the_recipe_cannot_compare_with_has_no_reward(recipe: str) -> None:
    """Evaluation meets such targets: their masks are scored, and the rest of the batch is as without them."""
    config = RewardConfig(recipe=recipe)
    targets = [(), (TARGET,), (TARGET, TARGET)]
    rows = [replace(example(*objects), id=f"row-{n}") for n, objects in enumerate(targets)]
    result = Scorer(config, FRAME, Answered([scored(0.5)])).send(rows, [[GOOD]] * 3).result()
    alone = Scorer(config, FRAME, Answered([scored(0.5)])).send(rows[1:2], [[GOOD]]).result()
    assert np.isnan(result.rewards_bg[[0, 2]]).all()
    assert [group[0] for group in result.components] == [{}, alone.components[0][0], {}]
    assert result.rewards_bg[1, 0] == alone.rewards_bg[0, 0] > 0
    assert result.masks == [[scored(0.5)]] * 3
