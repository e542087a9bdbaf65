"""Seconds per step on TPU slices, estimated from the compiler's own programs: a roofline, not a measurement.

    python -m benchmarks.tpu_on_paper [--response 256] [--output FILE]

For the presets of 3B and 7B on sixteen chips of three generations, ``segzero_jax.plan`` compiles every phase of a step
(16 prompts of 840 x 840 images, 8 responses each) and divides its work by the chip's published peaks. The seconds of a
phase are those of link traffic that the program overlaps with nothing ("waits"), and the longest of compute, memory and
other link traffic, perfectly overlapped. Seg-Zero's responses have 100 to 200 tokens, and a batch is cut to its
longest; ``--response`` is that length. Needs libtpu but no TPU; half an hour on two cores. With ``--output``, plans
that are already in the file are not compiled again.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax

from benchmarks.peer_group import need
from segzero_jax import config as configs
from segzero_jax.plan.phases import make_plan

ROOT = Path(__file__).parent.parent
MODELS = ("3b", "7b")
SLICES = ("v5e:4x4", "v6e:4x4", "v5p:2x2x4")
# VisionReasoner (arXiv 2505.12081): 443 steps in 6 hours on 8 GPUs.
PUBLISHED_S = 6 * 3600 / 443


def estimate(model: str, topology: str, response: int) -> dict[str, Any]:
    """The plan of a preset on a slice of sixteen chips."""
    path = ROOT / f"configs/seg_zero_{model}.yaml"
    changes = {"mesh": "4x4", "rollout.max_response_tokens": response, "train.micro_batch_size": 16}
    config = configs.replace(configs.load(path), **changes)
    return asdict(make_plan(config, path.name, topology, lambda phase: print(f"  {phase}", flush=True)))


def line(name: str, plan: dict[str, Any]) -> str:
    """The printed line for a plan."""
    if plan["seconds_per_step"] is None:
        over = [f"{p['phase']} takes {p['hbm_gib']:.2f} GiB" for p in plan["phases"] if not p["fits"]]
        return f"{name:20}{'-':>10}{'-':>16}  DOES NOT FIT: {', '.join(over)}"
    phases = ", ".join(f"{p['phase']} {p['runs'] * p['seconds']:.2f} ({p['bound']})" for p in plan["phases"])
    waits = sum(p["runs"] * p["waiting_seconds"] for p in plan["phases"])
    fits = "" if plan["fits"] else "  DOES NOT FIT"
    rates = f"{plan['seconds_per_step']:10.1f}{plan['samples_per_second_per_chip']:16.2f}"
    return f"{name:20}{rates}  {phases}; waits {waits:.2f}{fits}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--response", type=int, default=256, help="tokens of the longest response [256]")
    parser.add_argument("--output", type=Path, help="write the figures there as JSON, and go on with what it holds")
    args = parser.parse_args()
    need("dev", "libtpu")
    jax.config.update("jax_platforms", "cpu")
    found = json.loads(args.output.read_text()) if args.output and args.output.exists() else {}
    wanted = {f"{model} {topology} {args.response}": (model, topology) for model in MODELS for topology in SLICES}
    for name, (model, topology) in wanted.items():
        if name not in found:
            print(name, flush=True)
            found[name] = estimate(model, topology, args.response)
            if args.output:
                args.output.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{'':20}{'s a step':>10}{'samples/s/chip':>16}  seconds by phase (what bounds it)")
    print("\n".join(line(name, found[name]) for name in wanted))
    print(f"The original's step on 8 GPUs, published: {PUBLISHED_S:.1f} s. The figures above are estimates.")


if __name__ == "__main__":
    main()
