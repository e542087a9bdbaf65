"""The 3B on one GPU in bfloat16 beside transformers: shares of the hardware's peaks, and SAM 2 hiera-large.

    python -m benchmarks.gpu [--parts ours peer sam2] [--prompts 4] [--rounds 3] [--output FILE]

Each side draws its own weights of Qwen2.5-VL-3B's dimensions; shapes are Seg-Zero's (840 x 840 image, prompt of 1,150
tokens, 8 responses of 150). PyTorch trains one group, with gradient checkpointing, as TRL and EasyR1 do by default. Our
side trains all prompts of a step at once and keeps its activations; its times are divided by the number of prompts.
Sampling uses one prompt. Model FLOPs are those of the matrix products of the mathematics, without recomputation in the
backward pass. The bound of decoding is the data read for one token of every response: all language weights, and the KV
cache of prompt and responses. Needs 105 GB of GPU memory, with ``--prompts 6`` 130, and JAX and PyTorch with CUDA. Ends
with a one-line message if there is no GPU.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.peer_group import (
    LARGE_TEXT,
    LARGE_VISION,
    SPECIAL,
    Settings,
    Shape,
    Unequal,
    at_least,
    machine,
    need,
    side,
    write_question,
)
from segzero_jax.model.dims import Dims, from_hf

need("reward,dev", "torch", "sam2", "transformers")

import torch  # noqa: E402  (after what says how to get it)

from benchmarks.reward_server import random_checkpoint  # noqa: E402
from reward_server.segmenter import Segmenter  # noqa: E402

PARTS = ("ours", "peer", "sam2")
TOKENS = 128
# bfloat16 FLOP/s without sparsity and bytes/s of memory, as published by NVIDIA.
PEAKS = {"H100 80GB": (989e12, 3.35e12), "H200": (989e12, 4.8e12), "A100-SXM4-80GB": (312e12, 2.04e12)}
SAM_BATCH, SAM_ROUNDS = 8, 10


def language_weights(dims: Dims) -> int:
    """The number of weights in the matrices of the decoder's blocks."""
    heads = 2 * (dims.heads + dims.kv_heads) * dims.head_width
    return dims.layers * dims.hidden * (heads + 3 * dims.mlp)


def vision_flops(dims: Dims, patches: int) -> float:
    """FLOPs of one image: matrices, windowed and full attention, merger."""
    vision = dims.vision
    block = vision.hidden * (4 * vision.hidden + 3 * vision.mlp)
    wide = vision.hidden * vision.merge**2
    merger = wide * (wide + vision.out) / vision.merge**2
    whole = len(vision.full_attention)
    seen = whole * patches + (vision.depth - whole) * vision.window_slots
    return patches * (
        2 * (vision.patch_width * vision.hidden + vision.depth * block + merger) + 4 * vision.hidden * seen
    )


def forward_flops(dims: Dims, shape: Shape, responses: bool = True) -> float:
    """FLOPs of one prompt group, or of its prompt alone, each token once."""
    p, r, g = shape.prompt, shape.response, shape.group if responses else 0
    scores = p * (p + 1) / 2 + g * (r * p + r * (r + 1) / 2)
    flops = 2 * language_weights(dims) * (p + g * r) + 4 * dims.layers * dims.heads * dims.head_width * scores
    head = 2 * dims.hidden * dims.vocab * (g * r if responses else 1)
    return flops + head + vision_flops(dims, (shape.image // dims.vision.patch) ** 2)


def decode_bytes(dims: Dims, shape: Shape, tokens: int) -> float:
    """Bytes that a decode step reads, on average over ``tokens`` steps, in bfloat16."""
    weights = language_weights(dims) + dims.vocab * dims.hidden
    cached = shape.prompt + shape.group * tokens / 2
    return 2 * (weights + 2 * dims.layers * dims.kv_heads * dims.head_width * cached)


def shares(row: dict[str, float], dims: Dims, shape: Shape, peaks: tuple[float, float]) -> dict[str, float]:
    """MFU of each phase, tokens per second, and the share of the memory-bandwidth bound, from our side's seconds."""
    flops, bandwidth = peaks
    rate = shape.group * (TOKENS - 1) / (row["whole"] - row["first"])
    bound = shape.group * bandwidth / decode_bytes(dims, shape, TOKENS)
    return {
        "update MFU": 3 * forward_flops(dims, shape) / row["update"] / flops,
        "reference MFU": forward_flops(dims, shape) / row["reference"] / flops,
        "prefill MFU": forward_flops(dims, shape, responses=False) / (row["first"] - row["layout"]) / flops,
        "decode tokens/s": rate,
        "decode share of bound": rate / bound,
    }


def measure(module: str, directory: Path, settings: Settings, rounds: int) -> dict[str, float]:
    """Median seconds of one side, after a warm-up, to train on a group and to sample one; and its peak memory.

    Raises Unequal if loss, KL or gradient norm is not finite.
    """
    with side(module, directory, settings) as child:
        learnt = [child("learn") for _ in range(1 + rounds)][1:]
        for row in learnt:
            # Also, matrix products run faster on NaN.
            if not all(math.isfinite(row[number]) for number in ("loss", "kl", "grad_norm")):
                raise Unequal(f"{module}: loss, KL or gradient is not finite: {row}")
        made = [child("generate", tokens=TOKENS) for _ in range(1 + rounds)][1:]
    median = lambda rows, key: statistics.median(row[key] for row in rows)  # noqa: E731
    found = {key: median(learnt, key) / settings.prompts for key in ("old", "reference", "update")}
    found |= {key: median(made, key) for key in ("layout", "first", "whole")}
    return found | {"learning peak GiB": max(row["peak_gib"] for row in learnt)}


def sam_images_per_second() -> float:
    """Images per second that hiera-large with random weights encodes, in full batches."""
    with tempfile.TemporaryDirectory() as folder:
        segmenter = Segmenter.load(random_checkpoint(Path(folder), "large"), "cuda")
    pictures = [torch.randint(0, 256, (840, 840, 3), dtype=torch.uint8).numpy() for _ in range(SAM_BATCH)]
    segmenter.embed(pictures)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(SAM_ROUNDS):
        segmenter.embed(pictures)
    torch.cuda.synchronize()
    return SAM_ROUNDS * SAM_BATCH / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what is measured [all]")
    parser.add_argument("--prompts", type=at_least(1), default=4, help="prompt groups of a step of ours [4]")
    parser.add_argument("--rounds", type=at_least(1), default=3, help="timed steps and rollouts of each side [3]")
    parser.add_argument("--output", type=Path, help="write the figures there as JSON")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU here: expected one that PyTorch and JAX see")
    need("cuda", "jax_plugins")
    name = torch.cuda.get_device_name()
    peaks = next((peaks for part, peaks in PEAKS.items() if part in name), None)
    if peaks is None:
        sys.exit(f"{name}: no published peaks known, expected one of {', '.join(PEAKS)}; add it to PEAKS")
    peer = Settings("gpu", "bfloat16", remat=True, drawn=True)
    ours = replace(peer, remat=False, moment_dtype="bfloat16", prompts=args.prompts, together=args.prompts)
    dims = from_hf({"model_type": "qwen2_5_vl", **LARGE_TEXT, **SPECIAL, "vision_config": LARGE_VISION})
    print(name)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        write_question(Path(directory), Shape(), LARGE_TEXT, LARGE_VISION)
        for part, module, settings in (("ours", "jax_side", ours), ("peer", "torch_side", peer)):
            if part in args.parts:
                try:
                    found[part] = measure(f"benchmarks.{module}", Path(directory), settings, args.rounds)
                except Unequal as error:
                    sys.exit(f"no times: {error}")
                print(f"{part}: " + ", ".join(f"{key} {value:.3f}" for key, value in found[part].items()), flush=True)
    if "ours" in found and "peer" in found:
        print(f"{'':20}{'PyTorch':>10}{'ours':>10}{'ratio':>8}")
        for key, theirs in found["peer"].items():
            mine = found["ours"][key]
            print(f"{key:20}{theirs:10.2f}{mine:10.2f}{f'{theirs / mine:8.1f}' if mine else '':8}")
    if "ours" in found:
        found["shares"] = shares(found["ours"], dims, Shape(), peaks)
        for key, value in found["shares"].items():
            print(f"{key:24}{value:8.0f}" if key.endswith("/s") else f"{key:24}{value:8.1%}", flush=True)
    if "sam2" in args.parts:
        found["sam2 images/s"] = sam_images_per_second()
        print(f"{'SAM 2 hiera-large':24}{found['sam2 images/s']:8.1f} images/s")
    if args.output:
        args.output.write_text(json.dumps({"gpu": name, **found, **machine("torch", "transformers")}, indent=1) + "\n")


if __name__ == "__main__":
    main()
