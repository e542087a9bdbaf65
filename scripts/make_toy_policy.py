"""Makes the toy policy of the package: ``python scripts/make_toy_policy.py`` (25 minutes on two CPU cores).

Supervised warm start from random weights on endless toy scenes of the training distribution, stopped well before it is
perfect: it knows the format, names what it sees and points roughly. GRPO does the rest, without reasoning labels.
Writes safetensors beside the configuration and tokenizer in ``segzero_jax/assets/toy_policy``.
"""

import argparse
import dataclasses
import io
import multiprocessing
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image

from segzero_jax.data.scenes import Question, Scene, sample_lesson, sample_scene
from segzero_jax.frames import rescale_object
from segzero_jax.mesh import TRAIN, make_mesh, prepare_cpu
from segzero_jax.model.logprobs import response_logps
from segzero_jax.model.policy import ForwardConfig, Policy, group_hidden
from segzero_jax.model.weights import read_dims, save_hf
from segzero_jax.processor import EncodedPrompt, Processor
from segzero_jax.prompt import parse_answer, question_text, solution_text
from segzero_jax.rollout import Sampling, sample
from segzero_jax.types import Example, Frame, ObjectPrompt, PromptBatch

IMAGE_SIZE, PROMPT = 112, 64
# A lesson is one image with several questions. The image is the prompt of a prefix group and each question with its
# answer is a response, which is exact and encodes the image once.
LESSON_PROMPT, LESSON_QUESTIONS, LESSON_LENGTH = 32, 3, 72
EVAL_QUESTIONS, RESPONSE = 96, 64
WIDEN = 3.5
TURN = "<|im_end|>\n<|im_start|>assistant\n"
Step = Callable[[Policy, Any, PromptBatch, np.ndarray, np.ndarray], tuple[Policy, Any, jax.Array]]
OUT = Path(__file__).parent.parent / "segzero_jax" / "assets" / "toy_policy"


def as_example(scene: Scene, question: Question) -> tuple[Example, str]:
    """A scene as a data set row, and the target response."""
    target = scene.objects[question.answer]
    height, width = scene.image.shape[:2]
    obj = ObjectPrompt(tuple(map(float, target.box)), (tuple(map(float, target.point)),))
    buffer = io.BytesIO()
    Image.fromarray(scene.image).save(buffer, "PNG", compress_level=0)
    row = Example("scene", buffer.getvalue(), Frame(width, height), question.text, (obj,), None)
    seen = rescale_object(obj, row.frame, Frame(IMAGE_SIZE, IMAGE_SIZE))
    return row, f"<think> {question.reasoning} </think>\n<answer>{solution_text([seen])}</answer>"


def make_lessons(
    processor: Processor, size: int, easy: float, rng: np.random.Generator
) -> tuple[PromptBatch, np.ndarray, np.ndarray]:
    """Makes lessons, a share ``easy`` of them easy.

    Returns:
      Images as prompts, ids ``[b, g, r]`` of questions with answers, and the bool mask of the answers' tokens.
    """
    prompts = []
    tokens = np.full((size, LESSON_QUESTIONS, LESSON_LENGTH), processor.pad_id, np.int32)
    mask = np.zeros(tokens.shape, bool)
    for b in range(size):
        scene, questions = sample_lesson(LESSON_QUESTIONS, bool(rng.random() < easy), rng)
        for g, question in enumerate(questions):
            row, response = as_example(scene, question)
            asked = processor.encode_text(question_text("toy", question.text) + TURN)
            ids = [*asked, *processor.encode_text(response), processor.end_ids[0]][:LESSON_LENGTH]
            tokens[b, g, : len(ids)] = ids
            mask[b, g, len(asked) : len(ids)] = True
        prompts.append(cut_after_image(processor.encode(row), processor))
    return processor.batch(prompts, multiple=LESSON_PROMPT), tokens, mask


def cut_after_image(prompt: EncodedPrompt, processor: Processor) -> EncodedPrompt:
    """The part of a prompt that comes before its question."""
    end = int(np.flatnonzero(prompt.tokens_p == processor.image_id)[-1]) + 2
    positions = prompt.positions_3p[:, :end]
    return dataclasses.replace(
        prompt, tokens_p=prompt.tokens_p[:end], positions_3p=positions, next_position=int(prompt.positions_3p[0, end])
    )


def produce(queue: multiprocessing.Queue, size: int, easy: float, seed: int) -> None:
    """Fills the queue with lessons forever."""
    processor = Processor.load("toy", IMAGE_SIZE, "toy", PROMPT)
    rng = np.random.default_rng([seed, int(1000 * easy)])
    while True:
        queue.put(make_lessons(processor, size, easy, rng))


def box_iou(text: str, target: str) -> float:
    """IoU of the boxes in two responses; 0 unless each has exactly one."""
    ours, theirs = parse_answer(text).objects, parse_answer(target).objects
    if len(ours) != 1:
        return 0.0
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = ours[0].box, theirs[0].box
    w, h = min(ax2, bx2) - max(ax1, bx1) + 1, min(ay2, by2) - max(ay1, by1) + 1
    inter = max(w, 0.0) * max(h, 0.0)
    return inter / ((ax2 - ax1 + 1) * (ay2 - ay1 + 1) + (bx2 - bx1 + 1) * (by2 - by1 + 1) - inter)


def make_step(fwd: ForwardConfig, optimizer: optax.GradientTransformation, banned_ids: tuple[int, ...]) -> Step:
    """The jitted supervised update on lessons."""

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(policy, state, batch, tokens, mask):
        def loss(policy: Policy) -> jax.Array:
            hidden = group_hidden(policy, batch, tokens, fwd)
            logp, _ = response_logps(policy, hidden, tokens, fwd, 1.0, banned_ids)
            return -(logp * mask).sum() / mask.sum()

        value, gradient = jax.value_and_grad(loss)(policy)
        updates, state = optimizer.update(gradient, state, policy)
        return optax.apply_updates(policy, updates), state, value

    return step


def make_evaluation(processor: Processor, fwd: ForwardConfig) -> Callable[[Policy], str]:
    """A function that describes how well a policy answers questions of the training distribution."""
    rng = np.random.default_rng(12345)
    rows, wanted = zip(*(as_example(*sample_scene("val", rng)) for _ in range(EVAL_QUESTIONS)), strict=True)
    prompts = processor.batch([processor.encode(row) for row in rows])
    sampling = Sampling(1, RESPONSE, processor.end_ids, processor.pad_id, processor.visual_ids)

    def mean_iou(policy: Policy, greedy: bool) -> float:
        chosen = sampling._replace(greedy=greedy)
        rollout = jax.device_get(sample(policy, prompts, jax.random.key(0), fwd=fwd, sampling=chosen))
        texts = [processor.decode(row[0, : n[0]]) for row, n in zip(rollout.tokens_bgr, rollout.length_bg, strict=True)]
        return float(np.mean([box_iou(text, want) for text, want in zip(texts, wanted, strict=True)]))

    return lambda policy: f"box IoU greedy {mean_iou(policy, True):.3f} sampled {mean_iou(policy, False):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1200, help="the learning rate decays over them")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--batch", type=int, default=16, help="pictures a step")
    parser.add_argument("--easy", type=float, default=0.5, help="share of lessons with one or two objects")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    prepare_cpu("1x1")
    jax.set_mesh(make_mesh("1x1"))
    processor = Processor.load("toy", IMAGE_SIZE, "toy", PROMPT)
    dims = read_dims("toy")
    policy = jax.jit(partial(Policy, dims, TRAIN))(jax.random.key(args.seed))
    # At this width, N(0, 0.02^2) leaves attention flat and the image ignored for a thousand steps.
    policy = jax.tree.map(lambda x: x * WIDEN if x.std() > 0 else x, policy)
    fwd = ForwardConfig(dims, TRAIN, jnp.dtype("float32"))
    warm_up = optax.linear_schedule(0.0, 1.0, 300)
    rate = lambda count: args.lr * warm_up(count + 1) * jnp.maximum(0.05, 1 - count / args.steps)  # noqa: E731
    adamw = optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=0.01)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    state = jax.jit(optimizer.init)(policy)
    step, evaluate = make_step(fwd, optimizer, processor.visual_ids), make_evaluation(processor, fwd)

    spawn = multiprocessing.get_context("spawn")
    queue: multiprocessing.Queue = spawn.Queue(8)
    worker = spawn.Process(target=produce, args=(queue, args.batch, args.easy, args.seed), daemon=True)
    worker.start()
    losses: list[float] = []
    for count in range(1, args.steps + 1):
        policy, state, value = step(policy, state, *queue.get())
        losses.append(float(value))
        if count % 200 == 0 or count == args.steps:
            print(f"step {count} loss {np.mean(losses[-100:]):.4f} {evaluate(policy)}", flush=True)
    worker.terminate()
    for file in save_hf(policy, dims, args.out, max_file_bytes=3_500_000):
        print(file)


if __name__ == "__main__":
    main()
