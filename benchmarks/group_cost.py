"""How reference pass and update grow with the group, the prompt and the response: shared prompts against repeated ones.

    python -m benchmarks.group_cost [--plot docs/group_cost.png] [--output FILE]

Both layouts use this code: the repeated one has a row for every response, each with its own prompt and image, as in
other trainers. If their losses, KL or gradients differ, it ends with a one-line message. The policy is that of
``benchmarks/learning_phase.py``, with an image of 280 x 280 (100 tokens), in float32. Time is the median of three;
memory is the peak of the compiled programs. One size varies, the others stay at G = 8, prompts of 300 and responses of
64 tokens. ``--plot`` needs ``pip install -e '.[bench]'``. Takes about a quarter of an hour on two cores.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from benchmarks.jax_side import read_prompt
from benchmarks.peer_group import SPECIAL, TEXT, VISION, Shape, Unequal, machine, make_group, need
from segzero_jax.config import GrpoConfig, TrainConfig
from segzero_jax.grpo import (
    LossConfig,
    TrainState,
    UpdateBatch,
    initial_state,
    make_optimizer,
    policy_logps,
    update,
)
from segzero_jax.mesh import TRAIN, make_mesh
from segzero_jax.model.dims import Dims, from_hf
from segzero_jax.model.policy import ForwardConfig, Policy
from segzero_jax.types import Rollout

BASE = Shape(prompt=300, response=64, group=8, image=280)
SWEEPS = {"group": (1, 2, 4, 8, 16, 32), "prompt": (150, 300, 600, 1200), "response": (16, 64, 256, 512)}
LAYOUTS = ("shared", "repeated")
# Largest relative differences of loss, KL and gradient norm between the two layouts.
APART = {"loss": 1e-4, "kl": 1e-4, "grad_norm": 3e-4}


def place(tree: Any) -> Any:
    """Puts host arrays on the mesh as the train loop does."""
    mesh = jax.sharding.get_mesh()
    put = lambda x: jax.device_put(x, NamedSharding(mesh, TRAIN.spec("batch", *(None,) * (x.ndim - 1))))  # noqa: E731
    return jax.tree.map(put, tree)


def run(shape: Shape, layout: str, dims: Dims, rounds: int = 3) -> dict[str, float]:
    """Median seconds of reference pass and update, and the larger peak of their two programs."""
    group = make_group(shape, np.random.default_rng(0))
    prompt, responses = read_prompt(group), group["responses"][None]
    advantages = group["advantages"][None]
    if layout == "repeated":
        prompt = jax.tree.map(lambda x: np.repeat(x, shape.group, axis=0), prompt)
        responses, advantages = responses[0][:, None], advantages[0][:, None]
    size = responses.shape
    rollout = Rollout(responses, np.full(size[:2], size[2], np.int32), np.zeros(size, "f4"), np.ones(size[:2], bool))
    prompt, rollout, advantages, kept = place((prompt, rollout, advantages, np.ones(size[:2], bool)))
    fwd, loss = (
        ForwardConfig(dims, TRAIN, jnp.dtype("float32")),
        LossConfig(GrpoConfig(), 1.0, (), False, responses.shape[-1]),
    )
    optimizer = make_optimizer(TrainConfig(), freeze_vision=False)
    state: TrainState = initial_state(Policy(dims, TRAIN, jax.random.key(0)), optimizer)
    reference = Policy(dims, TRAIN, jax.random.key(1))
    first = policy_logps.lower(reference, prompt, rollout.tokens_bgr, fwd=fwd, loss_config=loss).compile()
    ref = first(reference, prompt, rollout.tokens_bgr)
    batch = UpdateBatch(prompt, rollout, advantages, kept, ref)
    second = update.lower(
        state, batch, optimizer=optimizer, fwd=fwd, loss_config=loss, micro_batches=1
    ).compile()  # fmt: skip
    seconds, numbers = [], {}
    for _ in range(rounds + 1):
        start = time.perf_counter()
        first(reference, prompt, rollout.tokens_bgr).block_until_ready()
        state, metrics = jax.block_until_ready(second(state, batch))
        seconds.append(time.perf_counter() - start)
        numbers = numbers or {name: float(metrics[name]) for name in APART}
    return {**numbers, "seconds": statistics.median(seconds[1:]), "gib": max(held(first), held(second)) / 2**30}


def held(program: jax.stages.Compiled) -> int:
    """Bytes of arguments, temporaries, and results that do not alias an argument.

    On CPU, XLA's own peak leaves out the temporaries.
    """
    memory = program.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes + results


def measure(dims: Dims) -> list[dict[str, Any]]:
    """Runs every sweep in both layouts and prints the results. Raises Unequal if the layouts' results differ."""
    rows = []
    for name, values in SWEEPS.items():
        for value in values:
            shape = replace(BASE, **{name: value})
            row: dict[str, Any] = {"varies": name, **asdict(shape)}
            for layout in LAYOUTS:
                row[layout] = run(shape, layout, dims)
                jax.clear_caches()
            for number, apart in APART.items():
                a, b = (row[layout][number] for layout in LAYOUTS)
                if not abs(a - b) <= apart * abs(b):
                    raise Unequal(f"{name} {value}: {number} {a:g} shared, {b:g} repeated")
            rows.append(row)
            seconds, gib = ([row[layout][key] for layout in LAYOUTS] for key in ("seconds", "gib"))
            print(
                f"{name:9}{value:6}   s: {seconds[0]:7.2f}{seconds[1]:8.2f}{seconds[1] / seconds[0]:6.1f} x"
                f"   GiB: {gib[0]:6.2f}{gib[1]:7.2f}{gib[1] / gib[0]:6.1f} x",
                flush=True,
            )
    return rows


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Plots seconds above and memory below, with a column per sweep; lines differ in more than colour."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = {"group": "responses a prompt (G)", "prompt": "prompt tokens (P)", "response": "response tokens (R)"}
    figure, axes = pyplot.subplots(2, len(SWEEPS), figsize=(11, 5.6), sharex="col", layout="constrained")
    for column, name in enumerate(SWEEPS):
        chosen = [row for row in rows if row["varies"] == name]
        for line, key in enumerate(("seconds", "gib")):
            axis = axes[line, column]
            for layout, style in zip(LAYOUTS, ("o-", "s--"), strict=True):
                values = [row[layout][key] for row in chosen]
                axis.plot([row[name] for row in chosen], values, style, label=f"prompt {layout}")
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
        axes[1, column].set_xlabel(labels[name])
    axes[0, 0].set_ylabel("seconds: reference + update")
    axes[1, 0].set_ylabel("GiB at the peak")
    axes[0, 0].legend()
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", type=Path, help="draw the figures there as PNG")
    parser.add_argument("--output", type=Path, help="write the figures there as JSON")
    args = parser.parse_args()
    if args.plot:
        need("bench", "matplotlib")
    jax.config.update("jax_platforms", "cpu")
    dims = from_hf({"model_type": "qwen2_5_vl", **TEXT, **SPECIAL, "vision_config": VISION})
    print(f"{'':24}shared  repeated")
    with jax.set_mesh(make_mesh("1x1")):
        try:
            rows = measure(dims)
        except Unequal as error:
            sys.exit(f"the layouts differ: {error}")
    if args.output:
        args.output.write_text(json.dumps({"rows": rows, **machine()}, indent=1) + "\n")
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
