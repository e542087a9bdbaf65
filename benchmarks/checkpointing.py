"""What checkpoints cost: how much saving every step slows the toy run, and how long a large save holds up the loop.

    python -m benchmarks.checkpointing [--output FILE] [--steps 60] [--gigabytes 1]

The toy run (``configs/toy.yaml``, its SAM 2 server included) trains in blocks of five steps that alternately save after
every step and never; the slowdown is the ratio of the medians of their steps, on the clock and in CPU seconds of the
trainer, which a busy machine disturbs less. The large state is float32 noise, donated
to an update as soon as the save returns; every save is of new numbers. About ten minutes on two free cores.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from segzero_jax import config as configs
from segzero_jax import train
from segzero_jax.checkpoint import Checkpoints
from segzero_jax.config import Config
from segzero_jax.grpo import TrainState
from segzero_jax.identity import Identity
from segzero_jax.mesh import make_mesh, prepare_cpu

BLOCK = 5
ROUNDS = 5
ARRAYS = 16
ROOT = Path(__file__).parent.parent


def toy_run(steps: int, folder: Path) -> dict[str, float]:
    """Median seconds of a step with and without a save before it, on the clock and of CPU time, and their ratios."""
    stamps: dict[int, tuple[float, float]] = {}
    saves = lambda step: (step - 1) // BLOCK % 2 == 1  # noqa: E731

    def due(config: Config, step: int) -> bool:
        stamps[step] = time.perf_counter(), time.process_time()
        return saves(step)

    train.checkpoint_due = due
    options = [f"--config={ROOT}/configs/toy.yaml", f"--train.steps={steps}", f"--run.dir={folder}"]
    options += ["--eval.examples=1"]
    if train.main(options) != 0:
        raise SystemExit("the toy run failed")
    found: dict[str, float] = {}
    for place, clock in enumerate(("wall", "cpu")):
        seconds: dict[bool, list[float]] = {True: [], False: []}
        for step in range(1, steps):
            # A save behind a step goes on during the next one.
            seconds[saves(step)].append(stamps[step + 1][place] - stamps[step][place])
        with_saves, without = statistics.median(seconds[True]), statistics.median(seconds[False])
        found |= {f"{clock}_with_s": with_saves, f"{clock}_without_s": without, clock: with_saves / without - 1}
    return found


def large_save(gigabytes: float, folder: Path) -> dict[str, float]:
    """Median seconds that a save holds up its caller, and that it takes until it is on the disk."""
    count = int(gigabytes * 1e9 / 4 / 3 / ARRAYS)
    advance = jax.jit(lambda tree: jax.tree.map(lambda x: x * 1.0001 + 1e-3, tree), donate_argnums=0)
    noise = lambda seed: {f"{i}": jax.random.normal(jax.random.key(seed + i), (count,)) for i in range(ARRAYS)}  # noqa: E731
    policy, moments = noise(0), (noise(100), noise(200))
    blocked, written = [], []
    with jax.set_mesh(make_mesh("1x1")), Checkpoints(folder) as checkpoints:
        for step in range(1, ROUNDS + 2):
            policy, moments = jax.block_until_ready(advance((policy, moments)))
            begin = time.perf_counter()
            state = TrainState(policy, moments, jnp.int32(step))  # type: ignore[arg-type]
            checkpoints.save(step, state, {}, Config(), Identity("", None))
            blocked.append(time.perf_counter() - begin)
            policy, moments = jax.block_until_ready(advance((policy, moments)))
            checkpoints.wait()
            written.append(time.perf_counter() - begin)
    # The first one also imports and compiles.
    hold, whole = statistics.median(blocked[1:]), statistics.median(written[1:])
    return {"gigabytes": gigabytes, "blocked_s": hold, "written_s": whole, "share": hold / whole}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="What checkpoints cost.")
    parser.add_argument("--output", type=Path, help="write the numbers there as JSON")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    args = parser.parse_args()
    prepare_cpu(configs.Config().mesh)
    with tempfile.TemporaryDirectory() as folder:
        found = {
            "large_save": large_save(args.gigabytes, Path(folder, "large")),
            "toy_run": toy_run(args.steps, Path(folder, "toy")),
        }
    large, toy = found["large_save"], found["toy_run"]
    print(
        f"a save of {large['gigabytes']:g} GB holds up the loop for {large['blocked_s']:.2f} s of "
        f"{large['written_s']:.2f} s: {large['share']:.1%}"
    )
    for clock, unit in (("wall", "s"), ("cpu", "CPU seconds")):
        print(
            f"a toy step takes {toy[f'{clock}_with_s']:.2f} {unit} when each is saved, "
            f"{toy[f'{clock}_without_s']:.2f} when none is: {toy[clock]:+.1%}"
        )
    if args.output:
        args.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
