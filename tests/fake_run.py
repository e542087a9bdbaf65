"""A made-up run directory with the format of a real one, for tests of what reads it."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco

from segzero_jax import config, overlay
from segzero_jax.data import scenes
from segzero_jax.metrics import MetricsWriter

SPLITS = ("val", "heldout_pairs")
MAXIMA = {"thinking_format": 1.0, "segmentation_format": 2.0, "accuracy": 3.0, "non_repeat": 1.0, "mask_iou": 1.0}


def encode(mask: np.ndarray) -> dict[str, Any]:
    """A mask as run files hold it."""
    rle = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"height": mask.shape[0], "width": mask.shape[1], "counts": rle["counts"].decode()}


def write_fake_run(
    run_dir: Path,
    steps: int = 12,
    evaluated: tuple[int, ...] = (0, 12),
    questions: int = 4,
    masks: bool = True,
    group: int = 4,
    planned: int | None = None,
    seed: int = 0,
    troubled: bool = False,
) -> None:
    """Writes a run whose rewards rise.

    Args:
      planned: above ``steps`` it makes this a run in progress.
      troubled: updates are skipped in steps 3, 4 and 7, all groups lose their spread in steps 6 to 9, responses of
        step 5 have no score, two saves fail, and a restart loses 20 s before step 4.
    """
    rng = np.random.default_rng(seed)
    overrides = {"train.steps": planned or max(steps, 1), "reward.server": "local" if masks else "none"}
    settings = config.replace(config.Config(), **overrides)
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(config.to_yaml(settings))
    after = {"evaluation": 11.0, "checkpoint": 1.5} if steps in evaluated else {}
    (run_dir / "clock.json").write_text(json.dumps({"after_step": steps, "ended": True, "seconds": after}))
    with MetricsWriter(run_dir, planned or steps, show_progress=False) as writer:
        for step in range(steps + 1):
            skill = 0.25 + 0.55 * (1 - np.exp(-2.5 * step / max(steps, 1)))
            if step:
                rows = _rollouts(writer, step, group, skill, masks, rng)
                writer.write_rollouts(step, rows)
                numbers = _metrics(rows, step, skill, masks, rng)
                if troubled:
                    numbers |= _trouble(step)
                    numbers["time/total"] += numbers.get("time/lost", 0.0)
                writer.write_step(step, numbers)
            if step in evaluated:
                for split in SPLITS:
                    _evaluation(writer, step, split, questions, skill, masks, rng)


def _metrics(rows: list[dict[str, Any]], step: int, skill: float, masks: bool, rng: np.random.Generator) -> dict:
    rewards = np.array([row["reward"] for row in rows])
    lengths = [row["length"] for row in rows]
    seconds = {"data": 0.05, "rollout": 2.1, "reward_wait": 0.12, "reference": 0.6, "update": 1.9}
    times = {f"time/{phase}": value * rng.uniform(0.9, 1.15) for phase, value in seconds.items()}
    times["time/other"] = 0.08
    beside = {"time/startup": 4.0, "time/compile": 14.0, "time/evaluation": 11.0} if step == 1 else {}
    beside |= {"time/checkpoint": 0.7} if step % 5 == 0 else {}
    whole = {"time/step": sum(times.values()), "time/total": sum(times.values()) + sum(beside.values())}
    components = {
        f"reward/{name}": float(np.mean([row["components"][name] for row in rows])) for name in rows[0]["components"]
    }
    mask_iou = {"mask_iou/mean": float(np.mean([row["mask_iou"] for row in rows]))} if masks else {}
    return {
        "reward/mean": rewards.mean(),
        "reward/std": rewards.std(),
        **components,
        "reward/zero_std_groups": float(rng.integers(0, 3)) / 16,
        "missing_scores": 0,
        "empty_thinking": 0.04 * rng.random(),
        "update/skipped": 0.0,
        "checkpoint/failed": 0,
        **{f"alarm/{name}": 0 for name in ("empty_thinking", "one_length", "no_spread", "low_entropy")},
        "kl": 0.02 * (skill - 0.25) + 0.001 * rng.random(),
        "entropy": 0.9 - 0.6 * skill + 0.03 * rng.standard_normal(),
        "loss": 0.01 * rng.standard_normal(),
        "grad_norm": 0.8 + 0.3 * rng.random(),
        "clip_fraction": 0.0,
        "lr": 1e-4,
        "response_length/mean": float(np.mean(lengths)),
        "response_length/min": min(lengths),
        "response_length/max": max(lengths),
        "finished": float(np.mean([row["finished"] for row in rows])),
        **mask_iou,
        "sampler_gap": 1e-5 * rng.random(),
        **beside,
        **times,
        **whole,
        "time/data_share": times["time/data"] / whole["time/step"],
        "time/goodput": 0.5,
        "tokens_per_second": 900 + 60 * rng.standard_normal(),
    }


def _trouble(step: int) -> dict[str, Any]:
    return (
        {
            "update/skipped": float(step in (3, 4, 7)),
            "reward/zero_std_groups": 1.0 if 6 <= step <= 9 else 0.1,
            "alarm/no_spread": int(8 <= step <= 9),
            "missing_scores": 3 if step == 5 else 0,
            "checkpoint/failed": (step >= 5) + (step >= 10),
        }
        | ({"loss": None, "grad_norm": None} if step in (3, 4, 7) else {})
        | ({"time/lost": 20.0} if step == 4 else {})
    )


def _rollouts(
    writer: MetricsWriter, step: int, group: int, skill: float, masks: bool, rng: np.random.Generator
) -> list[dict[str, Any]]:
    rows = []
    for prompt in range(2):
        asked = _ask(writer, "train", 2 * step + prompt, rng)
        answers = [_answer(asked, skill, masks, rng) for _ in range(group)]
        rewards = np.array([answer["reward"] for answer in answers])
        advantages = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
        for sample, (answer, advantage) in enumerate(zip(answers, advantages, strict=True)):
            row = {
                "step": step,
                "id": asked["id"],
                "sample": sample,
                "question": asked["question"],
                "text": answer["text"],
                "solution": asked["solution"],
                "reward": answer["reward"],
                "components": answer["components"],
                "mask_iou": answer["iou"],
                "length": len(answer["text"].split()) * 2,
                "finished": bool(rng.random() > 0.05),
                "advantage": advantage,
            }
            if prompt == 0:
                keys = ("image", "frame", "target_objects", "target_mask")
                row |= {key: asked[key] for key in keys} | {key: answer[key] for key in ("objects", "mask")}
                row["target_mask"] = asked["target_mask"] if masks else None
            rows.append(row)
    return rows


def _evaluation(
    writer: MetricsWriter, step: int, split: str, questions: int, skill: float, masks: bool, rng: np.random.Generator
) -> None:
    samples = []
    for index in range(questions):
        asked = _ask(writer, split, index, rng)
        asked["target_mask"] = asked["target_mask"] if masks else None
        samples.append(asked | _answer(asked, skill, masks, rng))
    mean = float(np.mean([sample["reward"] for sample in samples])) / 8
    summaries = {
        mode: {
            "giou": value,
            "giou_low": value - 0.04,
            "giou_high": value + 0.04,
            "ciou": value - 0.02,
            "box_accuracy": value + 0.03,
            "box_accuracy_low": value - 0.02,
            "box_accuracy_high": value + 0.08,
            "format_rate": 0.97,
            "reward": 8 * value,
            "count": questions,
        }
        for mode, value in {"greedy": mean, "sampled": mean - 0.05}.items()
    }
    if not masks:
        for numbers in summaries.values():
            numbers.update(giou=None, giou_low=None, giou_high=None, ciou=None)
    writer.write_evaluation(step, split, summaries, samples)


def _ask(writer: MetricsWriter, split: str, index: int, rng: np.random.Generator) -> dict[str, Any]:
    scene, question = scenes.make_example_scene(split, index)
    target = scene.objects[question.answer]
    buffer = io.BytesIO()
    Image.fromarray(scene.image).save(buffer, "PNG")
    identity = f"toy/{split}/{index}"
    return {
        "id": identity,
        "question": question.text,
        "solution": json.dumps([{"bbox_2d": list(target.box), "point_2d": list(target.point)}]),
        "image": writer.write_image(identity, buffer.getvalue()),
        "frame": [scene.image.shape[1], scene.image.shape[0]],
        "target_objects": [{"box": list(target.box), "points": [list(target.point)]}],
        "target_mask": encode(target.mask),
    }


def _answer(asked: dict[str, Any], skill: float, masks: bool, rng: np.random.Generator) -> dict[str, Any]:
    width, height = asked["frame"]
    target = asked["target_objects"][0]
    noise = rng.normal(0, (1 - skill) * 0.12 * width, 2)
    box = [round(value + noise[index % 2], 1) for index, value in enumerate(target["box"])]
    point = [round(value + noise[index], 1) for index, value in enumerate(target["points"][0])]
    truth = asked.get("target_mask") or encode(np.zeros((height, width), bool))
    true_mask = overlay.decode_mask(truth)
    mask = np.roll(true_mask, (round(noise[1]), round(noise[0])), (0, 1))
    iou = float((mask & true_mask).sum() / max(1, (mask | true_mask).sum()))
    components = {
        "thinking_format": float(rng.random() < 0.95),
        "segmentation_format": 2.0,
        "accuracy": float(sum(iou > bar for bar in (0.3, 0.5, 0.7))),
        "non_repeat": 1.0,
    }
    if masks:
        components["mask_iou"] = iou
    answer = json.dumps([{"bbox_2d": [round(v) for v in box], "point_2d": [round(v) for v in point]}])
    return {
        "text": f"<think>The {asked['question'].removeprefix('the ')} is the one near the "
        f"{'left' if point[0] < width / 2 else 'right'} side of the picture.</think><answer>{answer}</answer>",
        "objects": [{"box": box, "points": [point]}],
        "iou": iou if masks else None,
        "mask": encode(mask) if masks else None,
        "reward": sum(components.values()),
        "components": components,
    }
