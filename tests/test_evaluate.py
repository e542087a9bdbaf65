"""The evaluate command: every question counts, a run that was cut off goes on, checkpoints are chosen on validation."""

import json
import os
import re
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from box_server import BoxServer, encoded, serving
from PIL import Image
from pycocotools import mask as coco
from thread_pod import on_hosts

from reward_server import reward_pb2
from segzero_jax import config as configs
from segzero_jax import rescore, segmenting
from segzero_jax.checkpoint import Checkpoints
from segzero_jax.config import Config, RewardConfig
from segzero_jax.data.scenes import make_example_scene
from segzero_jax.evaluate import __main__ as command
from segzero_jax.evaluate import evaluator, respondent
from segzero_jax.evaluate.judging import PolicyJudge
from segzero_jax.evaluate.results import choose, is_validation, write_results
from segzero_jax.evaluate.work import EvaluateError, Task, work
from segzero_jax.file_lock import hold
from segzero_jax.grpo import TrainState
from segzero_jax.identity import Identity
from segzero_jax.mesh import make_mesh
from segzero_jax.model import save_hf
from segzero_jax.overlay import decode_mask
from segzero_jax.patches import decode_image
from segzero_jax.pods import Pod
from segzero_jax.report.gallery import Shown, _blame, _case, choose_cases
from segzero_jax.reward_messages import CandidateScore
from segzero_jax.scoring import Scored, Scorer
from segzero_jax.types import Example, Frame, ObjectPrompt, RleMask

QUESTIONS = 7


def rle(mask: np.ndarray) -> RleMask:
    packed = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return RleMask(*packed["size"], packed["counts"].decode())


def example(index: int) -> Example:
    """Scenes with a question; the third has no target, the fifth is no picture, the sixth asks too much.

    Of the second, what lies left of the target's point is to be ignored.
    """
    scene, question = make_example_scene("val", index)
    answer = scene.objects[question.answer]
    objects = (ObjectPrompt(tuple(map(float, answer.box)), (tuple(map(float, answer.point)),)),)
    mask, data, text = answer.mask, encoded(Image.fromarray(scene.image)), question.text
    if index == 2:
        objects, mask = (), np.zeros_like(mask)
    if index == 4:
        data = b"no picture"
    if index == 5:
        text = "the red circle " * 30
    frame = Frame(scene.image.shape[1], scene.image.shape[0])
    ignored = np.zeros_like(mask)
    ignored[:, : int(answer.point[0])] = True
    ignore = rle(ignored) if index == 1 else None
    return Example(f"q{index}", data, frame, text, objects, rle(mask), ignore, instance_id=f"thing{index // 2}")


class Source(list):
    """A split in memory."""

    checksum = "made up"

    def first(self, count: int) -> list[int]:
        """As if the second question were about the picture of the first."""
        return [0, *range(2, QUESTIONS), 1][:count]


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> Source:
    made = Source(example(index) for index in range(QUESTIONS))
    monkeypatch.setattr(evaluator, "open_split", lambda name, split, folder: made)
    return made


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving(BoxServer()) as found:
        yield found


def run(out: Path, address: str, *more: str) -> dict[str, Any]:
    arguments = ["--dataset=toy/val", "--checkpoint=toy", f"--out={out}", f"--server={address}", "--batch=2"]
    assert command.main([*arguments, *more]) == 0
    return json.loads((out / "results.json").read_text())


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def pixels_that_count(row: dict[str, Any], asked: Example) -> tuple[int, int]:
    """Of intersection and union."""
    target = decode_mask(vars(asked.mask))
    counted = np.ones_like(target) if asked.ignore is None else ~decode_mask(vars(asked.ignore))
    mask = np.zeros_like(target) if row["mask"] is None else decode_mask(row["mask"])
    return int((mask & target & counted).sum()), int(((mask | target) & counted).sum())


def test_a_split_is_evaluated_and_goes_on_where_it_was_cut_off(
    source: Source, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The shipped policy, with SAM 2 played by boxes: numbers from scratch, then the same bytes after a cut."""
    found = run(tmp_path, address, "--oracle")
    policy, oracle = found["evaluations"]
    folder = tmp_path / "toy-val" / "toy"
    rows = lines(folder / "samples.jsonl")
    assert [row["id"] for row in rows] == [f"q{i}" for i in range(QUESTIONS)]
    scored, again = [row for row in rows if row["mask_iou"] is not None], tmp_path / "again.jsonl"
    assert len(scored) >= QUESTIONS - 2
    again.write_text("".join(json.dumps(row) + "\n" for row in scored))
    rescore.main(["--recipe=vision_reasoner", "--mask-iou-weight=1", f"--input={again}", f"--output={again}"])
    assert [row["reward"] for row in lines(again)] == [row["reward"] for row in scored]

    inside = union = 0
    ious = []
    for row, asked in zip(rows, source, strict=True):
        i, u = pixels_that_count(row, asked)
        wrong = row["failure"] != ""
        ious.append(0.0 if wrong else i / u if u else 1.0)
        inside, union = inside + (0 if wrong else i), union + u
    numbers = policy["expression"]
    assert numbers["giou"] == pytest.approx(sum(ious) / QUESTIONS, abs=1e-9)
    assert numbers["ciou"] == pytest.approx(inside / union, abs=1e-9)
    assert max(ious) > 0
    assert (numbers["count"], numbers["no_target"]) == (QUESTIONS, 1)
    assert policy["instance"]["count"] == 4
    assert policy["failures"]["not_asked"] == 2
    assert {item["id"] for item in policy["failed"]} >= {"q4", "q5"}
    assert "max_prompt_tokens=64" in next(item["error"] for item in policy["failed"] if item["id"] == "q5")
    boxes = [asked.objects for asked in source]
    assert [row["objects"][0]["box"] for row in lines(tmp_path / "toy-val/oracle/samples.jsonl") if row["objects"]] == [
        list(objects[0].box) for objects in boxes if objects
    ]
    second = lines(tmp_path / "toy-val/oracle/samples.jsonl")[1]
    assert 0 < second["intersection"] < second["union"] < decode_mask(second["mask"]).sum()
    assert (second["intersection"], second["union"]) == pixels_that_count(second, source[1])
    assert oracle["expression"]["box_accuracy"] == 1.0
    assert oracle["expression"]["giou"] > numbers["giou"]
    page = (tmp_path / "index.html").read_text()
    for part in ("Best", "Worst", "data:image/jpeg", "the question could not be asked", "the segmenter's"):
        assert part in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")

    kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    asked_again: list[int] = []
    ask = respondent.Respondent.__call__

    def watched(self: respondent.Respondent, examples: list[Example], start: int) -> list[respondent.Reply]:
        asked_again.append(start)
        return ask(self, examples, start)

    monkeypatch.setattr(respondent.Respondent, "__call__", watched)
    whole = (folder / "samples.jsonl").read_bytes()
    (folder / "samples.jsonl").write_bytes(whole[: whole.rindex(b"\n", 0, -1) - 100])  # in the middle of q5
    (tmp_path / "results.json").unlink()
    run(tmp_path, address, "--oracle")
    assert asked_again == [4, 6]
    again = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert again.keys() == kept.keys()
    assert [path.name for path in kept if again[path] != kept[path]] == []

    capsys.readouterr()
    assert command.main(["--dataset=toy", "--checkpoint=toy", f"--out={tmp_path}", f"--server={address}"]) == 2
    complaint = capsys.readouterr().err
    assert "holds another evaluation (batch 2; now 32)" in complaint
    assert complaint.count("\n") == 1


def test_two_commands_do_not_work_on_the_same_answers(
    source: Source, address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "toy-val" / "toy"
    arguments = ["--dataset=toy/val", "--checkpoint=toy", f"--out={tmp_path}", f"--server={address}", "--batch=2"]
    with hold(folder, "evaluation"):
        assert command.main(arguments) == 2
    complaint = capsys.readouterr().err
    assert f"{folder}: process {os.getpid()} on " in complaint
    assert complaint.count("\n") == 1
    assert [path.name for path in folder.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("spoil", "anew"),
    [
        (lambda rows: [row for row in rows for _ in "ab"], 0),  # two commands in step
        (lambda rows: rows[:5] + rows[3:], 2),  # one that went on where another already was
        (lambda rows: rows + rows, None),  # one after the other: whole at its end
        (lambda rows: [*rows[:9], {"some": "thing"}, *rows[10:]], 4),
    ],
)
def test_answers_that_are_not_in_their_places_are_asked_for_again(
    spoil: Callable[[list[Any]], list[Any]], anew: int | None, source: Source, tmp_path: Path
) -> None:
    """``anew``: the first question that is asked again."""
    asked: list[int] = []

    def judge(examples: Sequence[Example], start: int) -> Callable[[], list[dict[str, Any]]]:
        asked.append(start)
        return lambda: [
            {"index": start + q, "sample": a, "id": one.id} for q, one in enumerate(examples) for a in (0, 1)
        ]

    task = Task("toy", "val", "made up", QUESTIONS, "toy", 2, {"batch": 2})
    rows = work(task, tmp_path, source, judge, lambda text: None)
    samples = task.folder(tmp_path) / "samples.jsonl"
    whole = samples.read_bytes()
    assert [(row["index"], row["sample"]) for row in rows] == [(q, a) for q in range(QUESTIONS) for a in (0, 1)]
    samples.write_text("".join(json.dumps(row) + "\n" for row in spoil(rows)))
    asked.clear()
    assert work(task, tmp_path, source, judge, lambda text: None) == rows
    assert samples.read_bytes() == whole
    assert asked == ([] if anew is None else [start for start in (0, 2, 4, 6) if start >= anew])


def test_answers_that_are_no_json_are_told(source: Source, tmp_path: Path) -> None:
    task = Task("toy", "val", "made up", QUESTIONS, "toy", 0, {"batch": 2})
    task.folder(tmp_path).mkdir(parents=True)
    (task.folder(tmp_path) / "task.json").write_text(json.dumps(asdict(task)))
    (task.folder(tmp_path) / "samples.jsonl").write_text('{"index": 0, {"index": 0}\n')
    with pytest.raises(EvaluateError, match=r"samples.jsonl:1: .*; delete the file to evaluate anew"):
        work(task, tmp_path, source, lambda *_: lambda: [], lambda text: None)


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_a_folder_that_says_nothing_of_itself_is_told(text: str, source: Source, tmp_path: Path) -> None:
    task = Task("toy", "val", "made up", QUESTIONS, "toy", 0, {"batch": 2})
    task.folder(tmp_path).mkdir(parents=True)
    (task.folder(tmp_path) / "task.json").write_text(text)
    with pytest.raises(EvaluateError, match=r"task.json: not what an evaluation says of itself; delete .* anew"):
        work(task, tmp_path, source, lambda *_: lambda: [], lambda text: None)


def test_a_limit_takes_of_every_picture_one_question_first(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other questions than the first ones are another evaluation, and the page shows the pictures that were asked."""
    shown = []
    monkeypatch.setattr(command, "decode_image", lambda data, name: shown.append(name) or decode_image(data, name))
    (limited,) = run(tmp_path, "none", "--limit=3")["evaluations"]
    assert [row["id"] for row in lines(tmp_path / "toy-val/toy/samples.jsonl")] == ["q0", "q2", "q3"]
    assert set(shown) == {"q0", "q2", "q3"}
    assert limited["options"]["order"] == "of every picture one"
    (first,) = run(tmp_path / "first", "none", "--limit=1")["evaluations"]
    assert "order" not in first["options"], "the first one, as ever"
    task = tmp_path / "toy-val/toy/task.json"
    older = json.loads(task.read_text())
    del older["options"]["order"]
    task.write_text(json.dumps(older))
    options = ["--dataset=toy/val", "--checkpoint=toy", f"--out={tmp_path}", "--server=none", "--batch=2", "--limit=3"]
    assert command.main(options) == 2
    assert "holds another evaluation (order None; now 'of every picture one')" in capsys.readouterr().err


def test_results_of_earlier_commands_stay(source: Source, address: str, tmp_path: Path) -> None:
    del source[3:]
    both = run(tmp_path, address, "--oracle")
    assert [one["checkpoint"] for one in both["evaluations"]] == ["toy", "oracle"]
    assert run(tmp_path, address) == both, "the policy's are made again, the oracle's are there"
    for other in ('{"evaluations": [', "[]", '{"evaluations": [{}], "chosen": null}'):
        (tmp_path / "results.json").write_text(other)
        assert run(tmp_path, address)["evaluations"] == both["evaluations"][:1], "what is none of ours is replaced"


def test_drawn_answers_are_all_measured(source: Source, address: str, tmp_path: Path) -> None:
    """Also those that were not given. A question that comes again, in another batch, is answered anew."""
    source[1:] = [source[2], replace(source[0], id="again"), source[4]]
    (policy,) = run(tmp_path, address, "--samples=3", "--seed=5")["evaluations"]
    rows = lines(tmp_path / "toy-val/toy/samples.jsonl")
    assert [(row["index"], row["sample"]) for row in rows] == [(i, a) for i in range(4) for a in range(3)]
    assert len({row["text"] for row in rows}) > 4
    first, again = ([row["text"] for row in rows if row["id"] == name] for name in ("q0", "again"))
    assert first != again
    assert policy["failures"]["not_asked"] == 3
    mean = sum(row["iou"] for row in rows) / 12
    assert policy["expression"]["giou"] == pytest.approx(mean, abs=1e-12)
    rewarded = [row["reward"] for row in rows if row["reward"] is not None]
    assert policy["expression"]["reward"] == pytest.approx(sum(rewarded) / 9)
    things = [[row["iou"] for row in rows if row["instance"] == f"thing{n}"] for n in (0, 1, 2)]
    assert policy["instance"]["count"] == 3
    assert policy["instance"]["giou"] == pytest.approx(np.mean([np.mean(ious) for ious in things]), abs=1e-12)
    # All that rows depend on, so that an export whose run asks otherwise is another evaluation.
    asked = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "mask_iou_weight": 1.0, "mask_iou_mode": "raw", "seed": 5}
    assert policy["options"].items() >= asked.items()
    other = tmp_path / "other"
    run(other, address, "--samples=3", "--seed=6")
    assert [row["text"] for row in lines(other / "toy-val/toy/samples.jsonl")] != [row["text"] for row in rows]


def test_a_question_that_the_runs_recipe_cannot_compare_with_has_no_reward(
    source: Source, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seg-Zero's recipes know exactly one object; every other number is as under another recipe."""
    del source[3:]  # The third has no target.
    (other,) = run(tmp_path / "other", address)["evaluations"]
    load = evaluator.load

    def with_recipe(*given: Any) -> Any:
        loaded = load(*given)
        return replace(loaded, config=configs.replace(loaded.config, **{"reward.recipe": "seg_zero_strict"}))

    monkeypatch.setattr(evaluator, "load", with_recipe)
    (policy,) = run(tmp_path, address)["evaluations"]
    rows = lines(tmp_path / "toy-val/toy/samples.jsonl")
    assert [(row["reward"] is None, len(row["components"])) for row in rows] == [(False, 6), (False, 6), (True, 0)]
    assert policy["expression"]["reward"] == pytest.approx((rows[0]["reward"] + rows[1]["reward"]) / 2)
    assert policy["expression"]["reward"] != other["expression"]["reward"]
    without_reward = [
        {key: value for key, value in one["expression"].items() if not key.startswith("reward")}
        for one in (policy, other)
    ]
    assert without_reward[0] == without_reward[1]


def test_the_weights_lie_in_device_memory_once(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that were read have gone when the first question is asked; the policy has them as it needs them."""
    del source[1:]
    read: list[weakref.ref[jax.Array]] = []
    load, ask = evaluator.load, respondent.Respondent.__call__
    alive = []

    def watched_load(*arguments: Any) -> Any:
        loaded = load(*arguments)
        read.extend(weakref.ref(leaf) for leaf in jax.tree.leaves(loaded.policy))
        return loaded

    def watched_ask(self: respondent.Respondent, examples: list[Example], start: int) -> list[respondent.Reply]:
        alive.append(sum(leaf() is not None for leaf in read))
        return ask(self, examples, start)

    monkeypatch.setattr(evaluator, "load", watched_load)
    monkeypatch.setattr(respondent.Respondent, "__call__", watched_ask)
    assert command.main(["--dataset=toy", "--checkpoint=toy", f"--out={tmp_path}", "--server=none"]) == 0
    assert (len(read) > 10, alive) == (True, [0])


class Slow(BoxServer):
    """Answers one call after another, with as many seconds for each as it is told; a call that ended it leaves."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds, self.alone, self.late = seconds, threading.Lock(), 0

    def Score(self, request: reward_pb2.ScoreRequest, context: grpc.ServicerContext) -> reward_pb2.ScoreResponse:
        with self.alone:
            if not context.is_active():
                self.late += 1
                context.abort(grpc.StatusCode.CANCELLED, "nobody waits")
            time.sleep(self.seconds)
            return super().Score(request, context)


def test_a_sam_that_takes_longer_than_a_call_may_is_asked_again(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine without a GPU, where one batch takes longer than the time of a call."""
    monkeypatch.setattr(segmenting, "_ANSWER_S", 1.0)
    server, asked = Slow(0.4), Source(example(0) for _ in range(8))
    monkeypatch.setattr(evaluator, "open_split", lambda *_: asked)
    with serving(server) as address:
        arguments = ["--dataset=toy", "--checkpoint=toy", f"--out={tmp_path}", f"--server={address}", "--oracle"]
        assert command.main(arguments) == 0
    found = json.loads((tmp_path / "results.json").read_text())["evaluations"]
    assert [one["expression"]["count"] for one in found] == [8, 8]
    assert found[1]["expression"]["giou"] > 0.4
    assert server.late > 0


def test_a_sam_that_is_silent_is_given_up(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    del source[1:]
    monkeypatch.setattr(segmenting, "_ANSWER_S", 0.5)
    monkeypatch.setattr(evaluator, "_PATIENCE_S", 2.0)
    with serving(Slow(5)) as address:
        arguments = ["--dataset=toy", "--checkpoint=toy", f"--out={tmp_path}", f"--server={address}"]
        assert command.main(arguments) == 3
    printed = capsys.readouterr()
    assert "waiting for scores since" in printed.out
    assert printed.err.count("\n") == 1
    assert re.search(
        r"no scores for \d s: .*: serves; .*no answer within 0.5 s.* the same command goes on", printed.err
    )
    assert "reward.timeout_s" not in printed.err


def test_a_server_that_is_away_at_the_start_may_be_back_later(
    source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not exit code 2, after which a pod is not started again; and no policy is loaded for nothing."""
    arguments = ["--dataset=toy", "--checkpoint=toy", f"--out={tmp_path / 'out'}", "--server=127.0.0.1:1"]
    assert command.main(arguments) == 3
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "127.0.0.1:1: unreachable" in printed
    assert not (tmp_path / "out").exists()


def train_anew(run: Path, model: Path, seed: int) -> None:
    """A run whose only step has weights of this seed; one that was there is gone."""
    shutil.rmtree(run, ignore_errors=True)
    with jax.set_mesh(make_mesh("1x1")):
        policy = tiny.random_policy(seed=seed)
        if not model.exists():
            save_hf(policy, tiny.DIMS, model, carry_from="toy")
            (model / "config.json").write_text(json.dumps(tiny.hf_config()))
        config = configs.replace(Config(), **{"model.path": str(model), "rollout.max_response_tokens": 8})
        with Checkpoints(run / "checkpoints") as checkpoints:
            checkpoints.save(120, TrainState(policy, (), jnp.int32(120)), {}, config, Identity("", None))
            checkpoints.wait()


def test_other_weights_at_the_same_path_are_another_evaluation(
    source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that was deleted and trained again with another seed; and with the first one."""
    del source[1:]
    train_anew(tmp_path / "run", tmp_path / "model", 0)
    arguments = ["--dataset=toy", f"--checkpoint={tmp_path}/run/checkpoints/120", f"--out={tmp_path}/out"]
    assert command.main([*arguments, "--server=none", "--batch=1"]) == 0
    answers = sorted((tmp_path / "out").rglob("samples.jsonl"))[0]
    first = answers.read_bytes()
    train_anew(tmp_path / "run", tmp_path / "model", 1)
    assert command.main([*arguments, "--server=none", "--batch=1"]) == 2
    assert re.search(r"holds another evaluation \(weights '\w{16}'; now '\w{16}'\)", capsys.readouterr().err)
    assert answers.read_bytes() == first
    train_anew(tmp_path / "run", tmp_path / "model", 0)
    assert command.main([*arguments, "--server=none", "--batch=1"]) == 0


def evaluated(checkpoint: str, split: str, giou: float | None, box: float = 0.0) -> dict[str, Any]:
    numbers = {"giou": giou, "box_accuracy": box}
    return {"checkpoint": checkpoint, "dataset": "d", "split": split, "expression": numbers}


def test_a_checkpoint_is_chosen_on_validation_only() -> None:
    results = [
        evaluated("a", "val", 0.5),
        evaluated("a", "val_b", 0.3),
        evaluated("b", "val", 0.4),
        evaluated("b", "val_b", 0.5),
        evaluated("a", "test", 0.9),
        evaluated("b", "testA", 0.1),
        evaluated("oracle", "val", 1.0),
    ]
    chosen = choose(results, ["a", "b"])
    assert chosen["checkpoint"] == "b"
    assert chosen["scores"] == {"a": pytest.approx(0.4), "b": pytest.approx(0.45)}
    assert (chosen["by"], chosen["on"]) == ("giou", ["d/val", "d/val_b"])
    assert choose([evaluated("a", "val", 0.4), evaluated("b", "val", 0.4)], ["a", "b"])["checkpoint"] == "a"
    by_box = choose([evaluated("a", "val", None, 0.2), evaluated("b", "val", None, 0.3)], ["a", "b"])
    assert (by_box["checkpoint"], by_box["by"]) == ("b", "box_accuracy")
    assert [is_validation(s) for s in ("val", "validation", "val_unc", "test", "testA", "heldout_pairs", "value")] == [
        *(True, True, True),
        *(False, False, False, False),
    ]


def test_a_result_replaces_that_of_the_same_split_of_the_same_set_alone(tmp_path: Path) -> None:
    first = [evaluated("a", "val", 0.1), evaluated("a", "test", 0.2), evaluated("a", "val", 0.3) | {"dataset": "e"}]
    write_results(tmp_path, first, None)
    again = evaluated("a", "val", 0.4)
    assert json.loads(write_results(tmp_path, [again], None).read_text())["evaluations"] == [again, *first[1:]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[tuple[str, tuple[str, ...]]]]:
    """Checkpoints and splits that each host was asked for; the second step is the best, as the first host finds."""
    asked: dict[int, list[tuple[str, tuple[str, ...]]]] = {0: [], 1: []}

    def policy(self: evaluator.Evaluator, checkpoint: str, sets: list[evaluator.Questions]) -> None:
        host = self._pod.index
        asked[host].append((checkpoint, tuple(one.split for one in sets)))
        for one in sets if host == 0 else []:
            giou = 0.3 if checkpoint.endswith("2") else 0.2
            self.results.append(evaluated(checkpoint, one.split, giou) | {"failed": [], "failures": {}, "samples": 0})
            self.rows.append([])

    monkeypatch.setattr(evaluator.Evaluator, "policy", policy)
    monkeypatch.setattr(command, "build_gallery", lambda *_: "page")
    monkeypatch.setattr(command, "_shown", lambda *_: [])
    return asked


def test_only_the_chosen_checkpoint_sees_the_other_splits(
    source: Source, asked: dict[int, list[tuple[str, tuple[str, ...]]]], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    for step in (1, 2, 3):
        (tmp_path / "run/checkpoints" / str(step) / "manifest").mkdir(parents=True)
    every = f"{tmp_path}/run/checkpoints"
    arguments = ["--dataset", "d/test", "d/val", "--checkpoint", every, f"--out={tmp_path}/out", "--server=none"]
    assert command.main(arguments) == 0
    assert asked[0] == [(f"{every}/{n}", ("val",)) for n in (1, 2, 3)] + [(f"{every}/2", ("test",))]
    results = tmp_path / "out/results.json"
    chosen = json.loads(results.read_text())["chosen"]
    assert chosen["checkpoint"] == f"{every}/2"
    assert command.main([*arguments, f"--checkpoint={every}/1"]) == 0
    assert json.loads(results.read_text())["chosen"] == chosen, "the second command chooses nothing"


def test_all_hosts_go_on_with_what_the_first_one_finds_and_chooses(
    source: Source, asked: dict[int, list[tuple[str, tuple[str, ...]]]], tmp_path: Path
) -> None:
    """Results are on the first host alone; the second sees a newer checkpoint."""
    for host, steps in ((0, (1, 2)), (1, (1, 2, 3))):
        for step in steps:
            (tmp_path / str(host) / "checkpoints" / str(step) / "manifest").mkdir(parents=True)

    def act(pod: Pod) -> None:
        arguments = ["--dataset", "d/test", "d/val", f"--checkpoint={tmp_path}/{pod.index}/checkpoints"]
        out = f"--out={tmp_path}/out{pod.index}"
        command.run(command._parser().parse_args([*arguments, out, "--server=none"]), pod)

    (tmp_path / "out0").mkdir()
    for ended in on_hosts(2, act):
        ended.result()
    every = f"{tmp_path}/0/checkpoints"
    assert asked[0] == asked[1] == [*((f"{every}/{n}", ("val",)) for n in (1, 2)), (f"{every}/2", ("test",))]
    assert (tmp_path / "out0/results.json").exists()
    assert not (tmp_path / "out1").exists()


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--batch", "4", "--batch: 32 on host 0 (w-0), 4 on host 1 (w-1)"),
        ("--limit", "4", "--limit: None on host 0 (w-0), 4 on host 1 (w-1)"),
        ("--samples", "4", "--samples: 0 on host 0 (w-0), 4 on host 1 (w-1)"),
        ("--seed", "4", "--seed: 0 on host 0 (w-0), 4 on host 1 (w-1)"),
        ("--image-size", "84", "--image-size: None on host 0 (w-0), 84 on host 1 (w-1)"),
        ("--prompt", "seg_zero", "--prompt: None on host 0 (w-0), seg_zero on host 1 (w-1)"),
    ],
)
def test_hosts_with_other_options_are_told(option: str, value: str, words: str, source: Source, tmp_path: Path) -> None:
    def act(pod: Pod) -> None:
        more = [f"{option}={value}"] if pod.index else []
        command.run(command._parser().parse_args(["--dataset=toy", f"--out={tmp_path}/out", *more]), pod)

    for ended in on_hosts(2, act):
        with pytest.raises(EvaluateError, match=re.escape(words)):
            ended.result()


def test_the_page_counts_components_by_the_recipe_of_the_checkpoint_that_it_shows(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chosen one's, whichever was asked last."""
    recipes = {"1": "vision_reasoner", "2": "seg_zero_strict", "3": "vision_reasoner"}

    def policy(self: evaluator.Evaluator, checkpoint: str, sets: list[evaluator.Questions]) -> None:
        step = checkpoint[-1]
        for one in sets:
            found = evaluated(checkpoint, one.split, 0.3 if step == "2" else 0.2)
            self.results.append(found | {"options": {"recipe": recipes[step]}})
            self.rows.append([])

    shown = []
    monkeypatch.setattr(evaluator.Evaluator, "policy", policy)
    monkeypatch.setattr(command, "build_gallery", lambda title, sections, results: shown.extend(sections) or "page")
    (tmp_path / "out").mkdir()
    for step in recipes:
        (tmp_path / "run/checkpoints" / step / "manifest").mkdir(parents=True)
    checkpoints = f"--checkpoint={tmp_path}/run/checkpoints"
    assert command.main(["--dataset=d/val", checkpoints, f"--out={tmp_path}/out", "--server=none"]) == 0
    assert [(one.result["checkpoint"][-1], one.recipe) for one in shown] == [("2", "seg_zero_strict")]


def test_a_target_without_a_mask_has_no_ceiling(
    source: Source, address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its target is what SAM 2 makes of box and point: the oracle would be compared with itself."""
    for index in (0, 2, 3):  # The third has no target, which needs no mask.
        source[index] = replace(source[index], mask=None)
    _, oracle = run(tmp_path / "some", address, "--oracle")["evaluations"]
    assert (oracle["count"], oracle["expression"]["count"]) == (QUESTIONS - 2, QUESTIONS - 2)
    ids = [row["id"] for row in lines(tmp_path / "some/toy-val/oracle/samples.jsonl")]
    assert ids == [f"q{index}" for index in range(QUESTIONS) if index not in (0, 3)]
    said = "toy/val: 2 of 7 questions have no target mask and are left out of the ceiling"
    assert said in capsys.readouterr().out
    assert (
        f"of the {QUESTIONS - 2} questions that have a mask, the same SAM 2"
        in (tmp_path / "some/index.html").read_text()
    )
    for index in range(QUESTIONS):
        source[index] = replace(source[index], mask=None, objects=source[0].objects)
    assert len(run(tmp_path / "none", address, "--oracle")["evaluations"]) == 1
    assert "the same SAM 2" not in (tmp_path / "none/index.html").read_text()


def test_whose_error_it_is_counts_every_drawn_answer() -> None:
    """As the table does: a question is its mean over the drawn answers."""
    rows = [
        {"id": f"q{index}", "index": index, "sample": sample, "iou": iou}
        for index, ious in enumerate(((1.0, 0.2), (0.9, 0.0), (0.1, 0.9)))
        for sample, iou in enumerate(ious)
    ]
    ceiling = [{"id": f"q{index}", "sample": 0, "iou": iou} for index, iou in enumerate((0.9, 0.8, 0.4))]
    words = _blame(Shown({}, rows, ceiling, lambda index: None, "vision_reasoner"))
    assert "gIoU 0.700" in words
    assert "0.300 is the segmenter's and 0.183 the policy's" in words  # 0.700 - 3.1 / 6
    assert "below IoU 0.5: 1 that the oracle gets right, 1 that it gets wrong too" in words


@pytest.mark.parametrize(
    ("recipe", "in_form"), [("seg_zero_soft", [True, False]), ("seg_zero_no_thinking", [False, True])]
)
def test_an_answer_is_in_the_form_that_the_runs_recipe_asks_for(recipe: str, in_form: list[bool]) -> None:
    """In its row, and as the page shows it: with reasoning or, under one recipe, without."""
    bare = '<answer>{"bbox": [1,2,3,4], "points_1": [1,2], "points_2": [3,4]}</answer>'
    asked = [replace(example(0), id=name) for name in ("reasoned", "bare")]
    replies = [respondent.Reply([text], [True]) for text in (f"<think>hm</think>{bare}", bare)]
    scorer = Scorer(RewardConfig(server="none", recipe=recipe), Frame(112, 112), None)  # type: ignore[arg-type]
    judge = PolicyJudge(lambda *_: replies, scorer, Frame(112, 112), recipe, None)  # type: ignore[arg-type]
    found = judge(asked, 0)()
    assert [row["well_formed"] for row in found] == in_form
    assert [row["components"]["segmentation_format"] for row in found] == [1.0, 1.0]
    shown = [_case(Shown({}, found, [], lambda index: None, recipe), row) for row in found]
    assert ["Not in the form asked for" not in text for text in shown] == in_form
    assert [text.count('<p class="thought">') for text in shown] == [recipe == "seg_zero_soft", 0]


def test_each_drawn_answer_has_its_own_mask_and_its_own_end() -> None:
    scored = Scored(np.zeros((1, 2)), [[{}, {}]], [[CandidateScore(iou, 1, 2, 0.5, None, "") for iou in (0.25, 0.75)]])
    sent = SimpleNamespace(result=lambda patience: scored)
    scorer = SimpleNamespace(send=lambda examples, texts, masks: sent)
    replies = [respondent.Reply(["<think> no end", "<think> so"], [False, True])]
    judge = PolicyJudge(lambda *_: replies, scorer, Frame(112, 112), "vision_reasoner", None)  # type: ignore[arg-type]
    rows = judge([example(0)], 7)()
    assert [(row["index"], row["sample"], row["mask_iou"]) for row in rows] == [(7, 0, 0.25), (7, 1, 0.75)]
    assert [row["failure"] for row in rows] == ["cut_off", "no_answer"]


def test_cases_are_the_ends_and_some_at_random() -> None:
    rows = [{"index": i, "sample": 0, "iou": i / 20, "box_accuracy": 0.0} for i in range(20)]
    rows += [{"index": i, "sample": 1, "iou": 1.0, "box_accuracy": 0.0} for i in range(20)]
    cases = choose_cases(rows)
    assert [row["index"] for row in cases["Best"]] == [19, 18, 17, 16]
    assert [row["index"] for row in cases["Worst"]] == [0, 1, 2, 3]
    assert len({row["index"] for row in cases["At random"]} - {19, 18, 17, 16, 0, 1, 2, 3}) == 4
    assert [row["index"] for row in choose_cases(rows[:1])["Worst"]] == [0]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--dataset=nothing"], ("'nothing'",)),
        (["--dataset=toy/nowhere"], ("'nowhere'", "heldout_pairs")),
        (["--dataset=toy/heldout_pairs", "--checkpoint", "toy", "absent"], ("expected a validation split",)),
        (["--dataset=toy", "--oracle", "--server=none"], ("--oracle", "got none")),
        (["--dataset=toy", "--mesh=4by4"], ("--mesh", "expected FSDPxTENSOR")),
        (["--dataset=toy", "--batch=0"], ("--batch", "above 0")),
        (["--dataset=toy", "--checkpoint=absent", "--server=none"], ("absent: expected a run directory",)),
        (["--dataset=toy", "--server=none", "--mesh=2x1", "--batch=3"], ("3 prompts", "cannot be split evenly")),
        (
            ["--dataset=toy", "--server=none", "--mesh=3x1", "--batch=3"],
            ("--mesh=3x1: 128 units", "cannot be split evenly"),
        ),
        (["--dataset=toy", "--server=none", "--out=taken"], ("--out=taken: is a file",)),
        (
            ["--dataset=toy", "--server=none", "--out=taken/a"],
            ("--out=taken/a: ", "/taken is a file"),
        ),
        ([], ("--dataset",)),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    parts: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if not arguments or ("nowhere" not in arguments[0] and "nothing" not in arguments[0]):
        monkeypatch.setattr(evaluator, "open_split", lambda *_: Source([example(0)]))
    Path("taken").touch()
    try:
        code = command.main([*arguments, f"--data-dir={tmp_path}"])
    except SystemExit as left:
        code = left.code
    printed = capsys.readouterr().err
    complaint = printed.strip().splitlines()[-1]
    assert code == 2, printed
    assert complaint.startswith("python -m segzero_jax.evaluate: ")
    for part in parts:
        assert part in complaint
    assert not list(Path("evaluate").rglob("*.jsonl"))


def test_other_hosts_do_not_wait_for_one_that_cannot_write(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One that has not joined yet is waited for until JAX aborts them, after five minutes."""
    left = []

    class Joined(Pod):
        def leave(self, code: int, line: str = "") -> int:
            left.append((code, line))
            return code

    monkeypatch.setattr(command, "join", lambda prog, advice: Joined())
    (tmp_path / "taken").touch()
    assert command.main(["--dataset=toy", "--server=none", f"--out={tmp_path}/taken"]) == 2
    assert left == [(2, f"--out={tmp_path}/taken: is a file, expected a folder")]
