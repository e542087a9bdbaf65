"""A whole training step beside TRL's ``GRPOTrainer``: seconds per step on the toy world, text rewards only.

    python -m benchmarks.trl_step [--image-size 112] [--prompts 16] [--steps 6] [--rounds 2] [--cores 2]
                                  [--output FILE]

Both sides use the same toy policy, images and questions, 16 prompts with 8 responses of at most 64 tokens, temperature
1, KL to a reference, AdamW, float32. ``--image-size 840`` shows the images at Seg-Zero's size, 900 prompt tokens
instead of 16. TRL then trains on one group at a time to save memory, but samples all groups at once: with 16 prompts
24 GB may not be enough, with ``--prompts 4`` they are. Each round trains both sides anew; the first two steps of a run
are warm-up and left out. If the sides' response lengths or rewards differ by more than sampling explains, no times are
reported. Needs ``pip install -e '.[bench]'``. Takes about five minutes on two cores, and sixteen with four prompts at
840 and ``--steps 4``.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.peer_group import ROOT, Unequal, at_least, keep_to, machine, need, turns
from segzero_jax import jsonl
from segzero_jax.config import Config

_WARM_UP = 2
# Tolerances for medians over steps of some 32 to 128 sampled responses: relative for lengths, absolute for rewards.
_LENGTHS, _REWARDS = 0.1, 0.25


def run_ours(steps: int, image_size: int, prompts: int) -> dict[str, list[float]]:
    """Runs our train loop; returns its step metrics."""
    room = Config().rollout.max_prompt_tokens + (image_size // 28) ** 2
    with tempfile.TemporaryDirectory() as directory:
        options = [f"--run.dir={directory}/run", f"--train.steps={steps}", "--reward.server=none"]
        options += [f"--data.image_size={image_size}", f"--rollout.max_prompt_tokens={room}"]
        options += [f"--train.batch_size={prompts}", f"--train.micro_batch_size={prompts}"]
        short = ["--eval.examples=1", "--eval.samples=1", "--data.eval_splits=[val]"]
        command = [sys.executable, "-m", "segzero_jax.train", *options, *short]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=sys.stderr)
        rows = jsonl.read(Path(directory) / "run/metrics.jsonl")
    return {
        "seconds": [row["time/total"] for row in rows],
        "lengths": [row["response_length/mean"] for row in rows],
        "rewards": [row["reward/mean"] for row in rows],
    }


def run_trl(steps: int, image_size: int, prompts: int, cores: int) -> dict[str, list[float]]:
    """Runs TRL's trainer in its own process; returns its step metrics."""
    command = [sys.executable, "-m", "benchmarks.trl_side", *map(str, (steps, image_size, prompts, cores))]
    environment = os.environ | {"OMP_NUM_THREADS": str(cores), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(ours: dict[str, float], theirs: dict[str, float]) -> None:
    """Raises Unequal unless both sides did the same work, within sampling noise."""
    for key, limit in (("lengths", _LENGTHS * theirs["lengths"]), ("rewards", _REWARDS)):
        if not abs(ours[key] - theirs[key]) <= limit:
            raise Unequal(f"{key}: {ours[key]:.2f}, TRL {theirs[key]:.2f}, expected at most {limit:.2f} apart")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image-size", type=int, default=112, help="pixels along a picture's side, 28 a token [112]")
    parser.add_argument("--prompts", type=at_least(1), default=16, help="prompts of a step, 8 responses to each [16]")
    parser.add_argument("--steps", type=at_least(_WARM_UP + 1), default=6, help="steps of each run [6]")
    parser.add_argument("--rounds", type=at_least(1), default=2, help="runs of each side [2]")
    parser.add_argument("--cores", type=at_least(1), default=2, help="cores of each side [2]")
    parser.add_argument("--output", type=Path, help="write the figures there as JSON")
    args = parser.parse_args()
    need("bench", "trl")
    keep_to(args.cores)
    runs: dict[str, list[dict[str, list[float]]]] = {"TRL": [], "ours": []}
    sides = {
        "ours": lambda: run_ours(args.steps, args.image_size, args.prompts),
        "TRL": lambda: run_trl(args.steps, args.image_size, args.prompts, args.cores),
    }
    for name, run in turns(args.rounds, sides):
        runs[name].append(run())
    found = {
        name: {key: statistics.median(x for run in made for x in run[key][_WARM_UP:]) for key in made[0]}
        for name, made in runs.items()
    }
    try:
        compare(found["ours"], found["TRL"])
    except Unequal as error:
        sys.exit(f"the sides differ, no times: {error}")
    print(f"{'':24}{'TRL':>8}{'ours':>8}{'ratio':>8}")
    theirs, mine = found["TRL"]["seconds"], found["ours"]["seconds"]
    print(f"{'seconds a step':24}{theirs:8.2f}{mine:8.2f}{theirs / mine:8.1f}")
    for key, label in (("lengths", "tokens a response"), ("rewards", "mean reward")):
        print(f"{label:24}{found['TRL'][key]:8.2f}{found['ours'][key]:8.2f}")
    if args.output:
        args.output.write_text(
            json.dumps({**found, "runs": runs, **machine("torch", "transformers", "trl")}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
