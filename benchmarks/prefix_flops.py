"""FLOPs of the reference pass and the update, with prompts shared by their answers and with prompts repeated.

    python -m benchmarks.prefix_flops [--answers 8] [--output FILE]

Both layouts are compiled for a TPU v5p-32 (16 chips with room for both) at the dimensions of Qwen2.5-VL-7B
(``segzero_jax.plan``; needs libtpu but no TPU): 16 images of 840 x 840 with prompts of 1,150 tokens, answers of 150.
The repeated layout is this code with one answer per prompt and 16 x G prompts. Takes about ten minutes on two cores.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import jax

from benchmarks.peer_group import machine, need
from segzero_jax import config as configs
from segzero_jax.plan.cost import Program
from segzero_jax.plan.phases import total_flops
from segzero_jax.plan.slices import make_topology_mesh
from segzero_jax.plan.step import Step, find_dims

PROMPTS, CHIPS = 16, 16
ROOT = Path(__file__).parent.parent


def measure(batch: int, group: int, micro_batch: int) -> dict[str, float]:
    """FLOPs over all chips, by phase."""
    changes = {
        "train.batch_size": batch,
        "train.micro_batch_size": micro_batch,
        "rollout.max_prompt_tokens": 1150,
        "rollout.max_response_tokens": 150,
    }
    config = configs.replace(configs.load(ROOT / "configs/seg_zero_7b.yaml"), **changes)
    mesh = make_topology_mesh("4x4", "v5p:2x2x4")
    with jax.set_mesh(mesh):
        step = Step(config, find_dims(config.model.path), mesh, group=group)
        flops = {}
        reference = partial(step.lower_logps, step.reference_policy)
        for name, lower in (("reference", reference), ("update", step.lower_update)):
            cost = Program(lower().compile().as_text()).cost
            flops[name] = CHIPS * total_flops(cost, step.attention_scores())
    return flops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--answers", type=int, default=8, help="answers a prompt [8]")
    parser.add_argument("--output", type=Path, help="write the figures there as JSON")
    args = parser.parse_args()
    need("dev", "libtpu")
    jax.config.update("jax_platforms", "cpu")
    shared = measure(PROMPTS, args.answers, micro_batch=4)
    repeated = measure(PROMPTS * args.answers, 1, micro_batch=4 * args.answers)
    rows = [*shared.items(), ("both", sum(shared.values()))]
    repeated["both"] = sum(repeated.values())
    print(f"{'PFLOP':12}{'shared':>10}{'repeated':>10}{'ratio':>8}")
    for name, flops in rows:
        print(f"{name:12}{flops / 1e15:10.2f}{repeated[name] / 1e15:10.2f}{repeated[name] / flops:8.2f}")
    if args.output:
        result = {"answers": args.answers, "shared": dict(rows), "repeated": repeated, **machine("libtpu")}
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
