"""What an update of the 3B reads and writes on a GPU that is not here, from the program that is compiled for it.

    python -m benchmarks.gpu_on_paper [--prompts 6] [--output FILE]

Compiles the update that ``benchmarks/gpu.py`` times, with the same flags, for one H200. Apart from matrix products and
attention, its time depends on the bytes moved. These are counted here by kind of instruction and divided by the memory
bandwidth: a bound, not a measurement. For cuBLAS and cuDNN each operand is counted once. Needs JAX for CUDA but no GPU;
two minutes on two cores.
"""

import argparse
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import jax
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.experimental import topologies

from benchmarks.peer_group import GPU_ENVIRONMENT, LARGE_TEXT, LARGE_VISION, SPECIAL, Shape, need
from segzero_jax import config as configs
from segzero_jax.mesh import arrange
from segzero_jax.model.dims import from_hf
from segzero_jax.plan import step as steps
from segzero_jax.plan.cost import Program
from segzero_jax.plan.hlo import Instruction

# NVIDIA's published figures, in the compiler's format; values not given, such as the tuning of products, need the card.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_core: 233472  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536  registers_per_block_limit: 65536  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535  block_dim_limit_z: 65535  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  memory_bandwidth: 4800000000000  l2_cache_size: 52428800  device_memory_size: 150000000000
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"  device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 10 }  runtime_version { major: 12 minor: 8 }
"""
BANDWIDTH = 4.8e12
CUDNN = 91000
KINDS = {"__cublas": "products", "__cudnn": "attention"}


class ForCuda:
    """A jitted function that is lowered for CUDA; by default JAX would ask a GPU for the platform's name."""

    def __init__(self, jitted: Any) -> None:
        self._jitted = jitted

    def lower(self, *arguments: Any, **static: Any) -> Any:
        return self._jitted.trace(*arguments, **static).lower(lowering_platforms=("cuda",))


def compile_update(prompts: int) -> Any:
    """The train loop's own update of ``prompts`` groups, compiled for the card."""
    card = topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x1")
    mesh, shape = arrange("1x1", card.devices), Shape()
    changes = {
        "mesh": "1x1",
        "data.image_size": shape.image,
        "model.compute_dtype": "bfloat16",
        "rollout.max_prompt_tokens": shape.prompt,
        "rollout.max_response_tokens": shape.response,
        "rollout.group_size": shape.group,
        "train.batch_size": prompts,
        "train.micro_batch_size": prompts,
        "train.moment_dtype": "bfloat16",
    }
    config = configs.replace(configs.Config(), **changes)
    dims = from_hf({"model_type": "qwen2_5_vl", **LARGE_TEXT, **SPECIAL, "vision_config": LARGE_VISION})
    asked = {  # Queries to the card before JAX uses cuDNN's attention.
        "check_cudnn_version": lambda: CUDNN,
        "check_compute_capability": lambda least: True,
        "is_cuda_compute_capability_equal": lambda other: False,
    }
    with (
        jax.set_mesh(mesh),
        mock.patch.multiple(cudnn, **asked),
        mock.patch.object(steps, "update", ForCuda(steps.update)),
    ):
        return steps.Step(config, dims, mesh).lower_update().compile()


def kind(instruction: Instruction) -> str:
    """The kind of an instruction: product, attention, or XLA's name of a fusion, which describes its content."""
    target = instruction.attribute(r'custom_call_target="([^"$]+)') or ""
    return KINDS.get(target) or instruction.name.split(".")[0].removeprefix("wrapped_").replace("_", " ")


def moved(text: str) -> Counter[str]:
    """Bytes that a program moves, by kind."""
    program, found = Program(text), Counter[str]()
    for instruction, cost, times in program.parts(program.entry):
        found[kind(instruction)] += round(times * cost.bytes)
    return +found  # Drops kinds that move no bytes.


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=6, help="prompt groups of an update [6]")
    parser.add_argument("--output", type=Path, help="write the figures there as JSON")
    args = parser.parse_args()
    need("cuda", "jax_plugins")
    os.environ |= GPU_ENVIRONMENT
    jax.config.update("jax_platforms", "cpu")
    compiled = compile_update(args.prompts)
    found, peak = moved(compiled.as_text()), compiled.memory_analysis().peak_memory_in_bytes / 2**30
    print(f"{'moved for':40}{'GB':>8}{'ms':>8}")
    for name, size in [*found.most_common(15), ("all", found.total())]:
        print(f"{name:40}{size / 1e9:8.1f}{size / BANDWIDTH * 1e3:8.1f}")
    print(f"peak memory {peak:.1f} GiB")
    if args.output:
        args.output.write_text(json.dumps({"prompts": args.prompts, "bytes": found, "peak GiB": peak}, indent=1) + "\n")


if __name__ == "__main__":
    main()
