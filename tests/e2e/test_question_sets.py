"""Every data set from its source to a score: built, trained on for two steps, evaluated."""

import json
from collections.abc import Iterator
from pathlib import Path

import grpc
import jax
import numpy as np
import pytest
import question_sources as sources
import tiny
from box_server import BoxServer, serving

from reward_server import reward_pb2
from reward_server.codec import decode_mask
from segzero_jax import train
from segzero_jax.data import build
from segzero_jax.data.pipeline import open_split
from segzero_jax.evaluate import __main__ as evaluate
from segzero_jax.hub import TOY
from segzero_jax.mesh import make_mesh
from segzero_jax.model import save_hf

# The split that is evaluated, and the gIoU of its first two targets' boxes: a box of w x h pixels, edges included, is
# painted as w - 1 by h - 1. Targets without masks have no ceiling.
HELD_OUT = {
    "refCOCOg_9k_840": ("train", None),
    "VisionReasoner_multi_object_7k_840": ("train", None),
    "ReasonSeg_hub": ("test", (60 * 40 / (61 * 41) + 59 * 40 / (60 * 41)) / 2),
    "refcoco": ("testA", 39 * 58 / (40 * 59)),
    "refcoco+": ("testB", 39 * 58 / (40 * 59)),
    "refcocog": ("test", 39 * 58 / (40 * 59)),
    # The hole in the middle does not count.
    "ReasonSeg": ("val", (59 * 49 - 400) / (60 * 50 - 400)),
    # The second question of both has no target, the first of own_lines no mask.
    "own_lines": ("val", 1.0),
    "own_coco": ("val", ((32 * 32 + 30 * 70) / (33 * 33 + 31 * 71) + 1) / 2),
}


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random policy as a checkpoint."""
    folder = tmp_path_factory.mktemp("policy")
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        if (TOY / name).exists():
            (folder / name).write_bytes((TOY / name).read_bytes())
    (folder / "config.json").write_text(json.dumps(tiny.hf_config()))
    with jax.set_mesh(make_mesh("1x1")):
        save_hf(tiny.random_policy(), tiny.DIMS, folder, dtype=np.float32)
    return folder


class Boxes(BoxServer):
    """Scores too: a box is its mask, both what is asked for and a target that has no mask."""

    def Score(self, request: reward_pb2.ScoreRequest, context: grpc.ServicerContext) -> reward_pb2.ScoreResponse:
        asked = reward_pb2.SegmentRequest(image=request.image, frame=request.frame, candidates=request.candidates)
        if request.target.WhichOneof("kind") == "objects":
            asked.candidates.append(request.target.objects)
        found = [one.mask for one in self.Segment(asked, context).candidates]
        masks = [decode_mask(rle, rle.height, rle.width) for rle in found]
        given, ignored = request.target.mask, request.ignore
        target = decode_mask(given, given.height, given.width) if given.counts else masks[-1]
        counted = ~decode_mask(ignored, ignored.height, ignored.width) if ignored.counts else np.ones_like(target)
        response = reward_pb2.ScoreResponse(request_id=request.request_id, api_version=self.version)
        response.target_area = int((target & counted).sum())
        for mask, rle in zip(masks[: len(request.candidates)], found, strict=False):
            both, either = int((mask & target & counted).sum()), int(((mask | target) & counted).sum())
            rle = rle if request.return_masks else None
            response.candidates.add(intersection=both, union=either, iou=both / either if either else 1.0, mask=rle)
        return response


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serving(Boxes()) as address:
        yield address


@pytest.mark.slow
@pytest.mark.parametrize("name", sources.ALL)
def test_built_trained_on_and_evaluated(name: str, policy: Path, server: str, tmp_path: Path) -> None:
    source = sources.ALL[name](tmp_path / "source")
    assert build.main([name, f"--source={source}", f"--data-dir={tmp_path}", "--workers=1"]) == 0
    run, out = tmp_path / "run", tmp_path / "scores"
    options = [f"--data.name={name}", f"--data.dir={tmp_path}", "--data.eval_splits=[]", "--data.image_size=56"]
    options += ["--train.batch_size=2", "--train.micro_batch_size=2", "--train.steps=2", "--rollout.group_size=2"]
    options += ["--rollout.max_response_tokens=8", f"--model.path={policy}", f"--run.dir={run}"]
    assert train.main([*options, "--reward.server=none"]) == 0
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2]
    rows = [json.loads(line) for line in (run / "rollouts/2.jsonl").read_text().splitlines()]
    source = open_split(name, "train", tmp_path)
    assert {row["id"] for row in rows} <= {example.id for example in source}
    split, ceiling = HELD_OUT[name]
    command = [f"--dataset={name}/{split}", f"--data-dir={tmp_path}", f"--checkpoint={run}", f"--out={out}"]
    assert evaluate.main([*command, f"--server={server}", "--oracle", "--batch=2", "--limit=2"]) == 0
    policys, *oracles = json.loads((out / "results.json").read_text())["evaluations"]
    asked = list(open_split(name, split, tmp_path))[:2]
    assert policys["count"] == len(asked)
    assert policys["expression"]["giou"] == 0, "it has learnt nothing yet, and no answer is left out"
    assert len(oracles) == (ceiling is not None)
    for one in oracles:
        assert one["count"] == sum(example.mask is not None or not example.objects for example in asked)
        assert one["expression"]["giou"] == pytest.approx(ceiling, abs=1e-9)
        assert one["expression"]["box_accuracy"] == 1


@pytest.mark.slow
def test_a_run_goes_on_with_the_data_that_it_began_with_wherever_they_lie(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other set has the same pictures and questions, and other boxes."""
    boxes = "<box>(9,10),(40,60)</box><points>(20,30),(30,44)</points>"
    given = {"one": {}, "other": {"solution": [boxes] * 6}, "elsewhere": {}}
    for name, changed in given.items():
        source = sources.solution_parquet(tmp_path / name, **changed)
        assert build.main(["mugs", f"--source={source}", f"--data-dir={tmp_path}/{name}/built", "--workers=1"]) == 0
    options = ["--data.name=mugs", "--data.eval_splits=[]", "--data.image_size=56", f"--model.path={policy}"]
    options += ["--train.batch_size=2", "--train.micro_batch_size=2", "--rollout.group_size=2"]
    options += ["--rollout.max_response_tokens=8", f"--run.dir={tmp_path}/run", "--reward.server=none"]
    ends = [
        train.main([*options, f"--train.steps={steps}", f"--data.dir={tmp_path}/{name}/built"])
        for steps, name in enumerate(given, start=1)
    ]
    assert ends == [0, 2, 0]
    assert "checkpoints/1: its mugs/train has checksum " in capsys.readouterr().err
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
