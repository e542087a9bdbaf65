"""The cost of checkpoints: how much saving every step slows the toy run, and how long a large save blocks the loop.

    python -m benchmarks.checkpointing [--output FILE] [--steps 90] [--gigabytes 1]

The toy run (``configs/toy.yaml``, its SAM 2 server included) trains in blocks of three steps that alternately save
after every step and never. Each block that saves is compared with the mean of its two neighbours, so that a drift in
speed cancels. The first step of a block is left out, since a save of the block before may still run in it. The slowdown
is the median over blocks, in wall-clock seconds and in CPU seconds of the trainer, which a busy machine affects less.
The large state is float32 noise, donated to an update as soon as the save returns; every save has new values. Takes
about ten minutes on two free cores.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks.peer_group import at_least, machine
from segzero_jax import loop, train
from segzero_jax.checkpoint import Checkpoints
from segzero_jax.config import Config
from segzero_jax.grpo import TrainState
from segzero_jax.identity import Identity
from segzero_jax.mesh import make_mesh

BLOCK = 3
ROUNDS = 5
ARRAYS = 16
ROOT = Path(__file__).parent.parent


def toy_run(steps: int, folder: Path) -> dict[str, float]:
    """Seconds that a save adds to a toy step, in wall-clock and CPU time, and as a share of the step."""
    stamps: dict[int, tuple[float, float]] = {}

    def due(config: Config, step: int) -> bool:
        stamps[step] = time.perf_counter(), time.process_time()
        return _saves((step - 1) // BLOCK)

    loop.checkpoint_due = due
    options = [f"--config={ROOT}/configs/toy.yaml", f"--train.steps={steps}", f"--run.dir={folder}"]
    options += ["--eval.examples=1"]
    if train.main(options) != 0:
        raise SystemExit("the toy run failed")
    found: dict[str, float] = {}
    for place, clock in enumerate(("wall", "cpu")):
        # A save after a step runs during the next one.
        seconds = [stamps[step + 1][place] - stamps[step][place] for step in range(1, steps)]
        added, without = compare_blocks(seconds)
        found |= {f"{clock}_added_s": added, f"{clock}_without_s": without, clock: added / without}
    return found


def compare_blocks(seconds: list[float]) -> tuple[float, float]:
    """Seconds that a save adds to a step, and seconds of a step without one, from those of all steps in order."""
    blocks = [seconds[first + 1 : first + BLOCK] for first in range(0, len(seconds) - BLOCK + 1, BLOCK)]
    times = [statistics.mean(block) for block in blocks]
    added = [
        times[number] - (times[number - 1] + times[number + 1]) / 2
        for number in range(1, len(times) - 1)
        if _saves(number)
    ]
    without = [time for number, time in enumerate(times) if not _saves(number)]
    return statistics.median(added), statistics.median(without)


def _saves(block: int) -> bool:
    return block % 2 == 1


def large_save(gigabytes: float, folder: Path) -> dict[str, float]:
    """Median seconds that a save blocks its caller, and that it takes until it is on disk."""
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
    parser.add_argument("--steps", type=at_least(3 * BLOCK), default=90)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # The toy run comes first, since it configures JAX, which must happen before anything else uses it.
        toy = toy_run(args.steps, Path(folder, "toy"))
        found = {"large_save": large_save(args.gigabytes, Path(folder, "large")), "toy_run": toy}
    large = found["large_save"]
    print(
        f"a save of {large['gigabytes']:g} GB holds up the loop for {large['blocked_s']:.2f} s of "
        f"{large['written_s']:.2f} s: {large['share']:.1%}"
    )
    for clock, unit in (("wall", "s"), ("cpu", "CPU seconds")):
        print(
            f"a save adds {toy[f'{clock}_added_s']:.2f} {unit} to a toy step, which takes "
            f"{toy[f'{clock}_without_s']:.2f} without: {toy[clock]:+.1%}"
        )
    if args.output:
        args.output.write_text(json.dumps({**found, **machine("orbax-checkpoint")}, indent=1) + "\n")


if __name__ == "__main__":
    main()
