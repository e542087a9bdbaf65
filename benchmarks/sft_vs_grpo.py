"""Supervised fine-tuning against GRPO on the toy world, from the same start: the table of docs/evaluation.md.

    python -m benchmarks.sft_vs_grpo [--seeds 0 1] [--limit N] [--output DIR]

Nobody labels the reasoning, so a supervised answer is an empty ``<think> </think>`` and the target's box and point.
GRPO gets the same target through its rewards alone. Both start from the shipped policy, with the same optimizer and the
same questions in the same order. GRPO samples eight answers a question, so supervised training is measured twice: after
as many questions, and after as many answers learnt from, which are eight times the steps. A third way keeps the
reasoning: the answer is learnt behind what the start policy itself thinks about the question. Each policy then answers
the questions of every held-out split greedily, with the code of ``python -m segzero_jax.evaluate``.

About 25 minutes a seed on two cores. What is in DIR already is not made again.
"""

import argparse
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from segzero_jax import config as configs
from segzero_jax.answers import thinking
from segzero_jax.checkpoint import Checkpoints
from segzero_jax.config import Config
from segzero_jax.data.batches import training_batches
from segzero_jax.data.pipeline import open_split
from segzero_jax.evaluate.evaluator import Evaluator, How, open_questions
from segzero_jax.evaluate.results import write_results
from segzero_jax.grpo import TrainState
from segzero_jax.identity import Identity
from segzero_jax.intervals import with_interval
from segzero_jax.job import Job, prepare
from segzero_jax.mesh import make_mesh, prepare_cpu
from segzero_jax.model.logprobs import response_logps
from segzero_jax.model.policy import ForwardConfig, Policy, group_hidden
from segzero_jax.pods import ALONE
from segzero_jax.rollout import sample
from segzero_jax.run_dir import open_run
from segzero_jax.scoring import solution
from segzero_jax.types import Example, PromptBatch

SPLITS = ("val", "heldout_pairs", "heldout_crowd", "heldout_relations")
_SAY_EVERY = 40
_STEPS = Config().train.steps
_MORE = Config().rollout.group_size  # answers per question that GRPO trains on


@partial(jax.jit, static_argnames=("optimizer", "fwd", "banned_ids"), donate_argnames=("state",))
def supervised_update(
    state: TrainState,
    prompts: PromptBatch,
    tokens_bgr: jax.Array,
    mask_bgr: jax.Array,
    *,
    optimizer: optax.GradientTransformation,
    fwd: ForwardConfig,
    banned_ids: tuple[int, ...],
) -> tuple[TrainState, jax.Array]:
    """One step on target answers: prefix groups of one response, with mean cross-entropy over their tokens."""

    def loss(policy: Policy) -> jax.Array:
        hidden = group_hidden(policy, prompts, tokens_bgr, fwd)
        logps, _ = response_logps(policy, hidden, tokens_bgr, fwd, 1.0, banned_ids)
        return -(logps * mask_bgr).sum() / mask_bgr.sum()

    value, gradients = jax.value_and_grad(loss)(state.params)
    updates, optimizer_state = optimizer.update(gradients, state.opt_state, state.params)
    return TrainState(optax.apply_updates(state.params, updates), optimizer_state, state.num_updates + 1), value


def target_answers(job: Job, examples: list[Example], thoughts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids ``[b, 1, r]`` of the correct answers after these thoughts, and the bool mask of the trained tokens.

    An empty thought is trained along with its answer; a longer one is context only.
    """
    processor, length = job.processor, job.config.rollout.max_response_tokens
    tokens = np.full((len(examples), 1, length), processor.pad_id, np.int32)
    mask = np.zeros(tokens.shape, bool)
    for b, (example, thought) in enumerate(zip(examples, thoughts, strict=True)):
        before = processor.encode_text(f"<think>{thought}</think>")
        answer = f"\n<answer>{solution(example, job.frame, job.config.reward.recipe)}</answer>"
        ids = [*before, *processor.encode_text(answer), processor.end_ids[0]][:length]
        tokens[b, 0, : len(ids)] = ids
        mask[b, 0, len(before) if thought.strip() else 0 : len(ids)] = True
    return tokens, mask


class Thinker:
    """The start policy's own greedy reasoning about questions."""

    def __init__(self, job: Job, start: Policy) -> None:
        self._job, self._weights = job, job.to_rollout(start)
        self._sampling = job.sampling._replace(greedy=True, group=1)

    def __call__(self, prompts: PromptBatch) -> list[str]:
        job, key = self._job, jax.random.key(0)
        rollout = sample(self._weights, prompts, key, fwd=job.rollout_fwd, sampling=self._sampling)
        return [thinking(text) or " " for (text,) in job.texts(job.fetch(rollout))]


def train_supervised(config: Config, checkpoints_at: tuple[int, ...], own_thoughts: bool) -> None:
    """Supervised fine-tuning for ``train.steps``, with a checkpoint after each of these steps.

    Args:
      own_thoughts: answers follow the start policy's own reasoning instead of an empty thought.
    """
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        job, state, start = prepare(config, mesh, ALONE)
        think = Thinker(job, start)
        source = open_split(config.data.name, "train", Path(config.data.dir).expanduser())
        batches = training_batches(source, config.train.batch_size, config.seed)
        with Checkpoints(open_run(config) / "checkpoints", keep=len(checkpoints_at)) as checkpoints:
            for step in range(1, config.train.steps + 1):
                examples = next(batches)
                prompts = job.encode(examples)
                thoughts = think(prompts) if own_thoughts else [" "] * len(examples)
                tokens, mask = job.place(target_answers(job, examples, thoughts), range(len(examples)))
                state, value = supervised_update(
                    state,
                    prompts,
                    tokens,
                    mask,
                    optimizer=job.optimizer,
                    fwd=job.train_fwd,
                    banned_ids=job.processor.visual_ids,
                )
                if step % _SAY_EVERY == 0:
                    print(
                        f"sft seed {config.seed} step {step}/{config.train.steps}: loss {float(value):.4f}", flush=True
                    )
                if step in checkpoints_at:
                    checkpoints.save(step, state, batches.get_state(), config, Identity(config.model.path, None))


def train_grpo(seed: int, run: Path) -> None:
    """Runs the toy training in its own process."""
    command = [sys.executable, "-m", "segzero_jax.train", f"--seed={seed}", f"--run.dir={run}"]
    subprocess.run([*command, "--data.eval_splits=[]"], check=True)


def trained(seed: int, out: Path) -> dict[str, str]:
    """Checkpoints by method name; missing ones are trained."""
    grpo, sft, own = (out / f"{method}_{seed}" for method in ("grpo", "sft", "sft_own"))
    if not _there(grpo, _STEPS):
        train_grpo(seed, grpo)
    more = _STEPS * _MORE
    for run, steps, own_thoughts in ((sft, (_STEPS, more), False), (own, (_STEPS,), True)):
        if not _there(run, steps[-1]):
            changes = {"seed": seed, "run.dir": str(run), "train.steps": steps[-1], "reward.server": "none"}
            train_supervised(configs.replace(Config(), **changes), steps, own_thoughts)
    return {
        "GRPO": f"{grpo}/checkpoints/{_STEPS}",
        "SFT, as many questions": f"{sft}/checkpoints/{_STEPS}",
        "SFT, as many answers": f"{sft}/checkpoints/{more}",
        "SFT after its own reasoning, as many questions": f"{own}/checkpoints/{_STEPS}",
    }


def _there(run: Path, step: int) -> bool:
    return (run / "checkpoints" / str(step)).is_dir()


def table(results: list[dict[str, Any]], methods: dict[str, dict[int | None, str]]) -> str:
    """The results in Markdown: a row for every method and seed, a column for every split."""
    found = {(one["checkpoint"], one["split"]): one["expression"] for one in results}
    lines = ["| | seed | " + " | ".join(SPLITS) + " |", "|---|---|" + "---|" * len(SPLITS)]
    for method, checkpoints in methods.items():
        for seed, checkpoint in checkpoints.items():
            cells = [found[checkpoint, split] for split in SPLITS]
            numbers = (with_interval(one, "giou") for one in cells)
            lines.append(f"| {method} | {'' if seed is None else seed} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--limit", type=int, help="the first so many questions of each split")
    parser.add_argument("--output", type=Path, default=Path("runs/sft_vs_grpo"))
    args = parser.parse_args()
    prepare_cpu("1x1")
    methods: dict[str, dict[int | None, str]] = {"start": {None: "toy"}}
    for seed in args.seeds:
        for method, checkpoint in trained(seed, args.output).items():
            methods.setdefault(method, {})[seed] = checkpoint
    sets = [open_questions(f"toy/{split}", Config().data.dir, args.limit) for split in SPLITS]
    out = args.output / "evaluate"
    with jax.set_mesh(make_mesh("1x1")), Evaluator(How(), out) as evaluator:
        for checkpoints in methods.values():
            for checkpoint in checkpoints.values():
                evaluator.policy(checkpoint, sets)
        path = write_results(out, evaluator.results, None)
    print(table(evaluator.results, methods))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
