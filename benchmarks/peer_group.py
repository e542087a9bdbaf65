"""One prompt group at Seg-Zero's shapes, to compare with PyTorch: checkpoints that both sides load, and one question.

The policy is a Qwen2.5-VL of 46 M parameters in float32, written by transformers with random weights; the reference is
another of the same dimensions. Their decoders' matrices are three times what transformers draws, so that the next token
depends on all earlier ones; otherwise it depends on the last token alone, which is then repeated for ever. The image
has 840 x 840 pixels, which are 900 of the prompt's tokens. Each side runs in its own process
(``benchmarks/jax_side.py``, ``benchmarks/torch_side.py``) and does one thing at a time on request, so that the rounds
of both alternate and memory is counted separately.
"""

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")
ROOT = Path(__file__).parent.parent
IMAGE, UNIT = 840, 28
_LOUDER = 3.0
# All special ids are below this one.
FIRST_TEXT_ID = 10
TEXT = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
    "tie_word_embeddings": True,
}
VISION = {
    "depth": 8,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_heads": 6,
    "out_hidden_size": 512,
    "patch_size": 14,
    "spatial_patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [3, 7],
    "in_channels": 3,
}
SPECIAL = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "vision_start_token_id": 3,
    "vision_end_token_id": 4,
    "image_token_id": 5,
    "video_token_id": 6,
}


# The dimensions of Qwen2.5-VL-3B, which fills a GPU.
LARGE_TEXT = TEXT | {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
}
LARGE_VISION = VISION | {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 2048,
    "fullatt_block_indexes": [7, 15, 23, 31],
}


# As docs/performance.md recommends for GPUs: cuBLAS reads a layer's weights in place from the stack of all layers,
# while XLA's own matrix products copy them first.
GPU_ENVIRONMENT = {
    "XLA_FLAGS": "--xla_gpu_enable_triton_gemm=false --xla_gpu_dot_merger_threshold_mb=0",
    "XLA_PYTHON_CLIENT_MEM_FRACTION": ".93",
}


class Unequal(Exception):
    """The two sides do not compute the same thing, so their times cannot be compared."""


@dataclass(frozen=True)
class Shape:
    """Tokens of the prompt and of each response, responses of the group, and side of the image in pixels."""

    prompt: int = 1150
    response: int = 150
    group: int = 8
    image: int = IMAGE


def need(extra: str, *modules: str) -> None:
    """Ends the benchmark with a one-line message if a module it needs is not installed."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            sys.exit(f"{module} is not installed: pip install -e '.[{extra}]' -c constraints.txt")


def at_least(least: int) -> Callable[[str], int]:
    """An argparse type for whole numbers of at least ``least``: with fewer rounds there would be no median."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text}: expected a whole number, {least} or more")
        return int(text)

    return read


def keep_to(cores: int) -> None:
    """Restricts this process and its children to ``cores`` cores: XLA and PyTorch then start as many threads."""
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < cores:
        sys.exit(f"--cores {cores}: this process may use {len(allowed)}")
    os.sched_setaffinity(0, allowed[:cores])


@dataclass(frozen=True)
class Settings:
    """Settings of a side.

    Attributes:
      device: "cpu" or "gpu".
      dtype: dtype of activations, and of PyTorch's weights; ours are float32 and cast where they are used.
      remat: recompute the activations of a block in the backward pass.
      moment_dtype: dtype of AdamW's first moment, on our side.
      prompts: groups per step.
      together: groups per micro-batch, on our side; PyTorch, which holds a group's prompt eight times, takes one.
      drawn: each side draws its own weights of the same dimensions, when no values are compared.
      cores: CPU cores of each side.
    """

    device: str = "cpu"
    dtype: str = "float32"
    remat: bool = False
    moment_dtype: str = "float32"
    prompts: int = 1
    together: int = 1
    drawn: bool = False
    cores: int = 2


def write(directory: Path, shape: Shape, seed: int = 0) -> None:
    """Writes ``policy/`` and ``reference/`` in the hub's form, and ``group.npz``."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.utils import logging

    logging.disable_progress_bar()
    write_question(directory, shape, TEXT, VISION, seed)
    for number, name in enumerate(("policy", "reference")):
        where = directory / name
        text = (where / "config.json").read_text()
        torch.manual_seed(seed + number)
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_pretrained(where))
        with torch.no_grad():
            for weight in model.model.language_model.layers.parameters():
                if weight.ndim == 2:
                    weight *= _LOUDER
        model.save_pretrained(where)
        (where / "config.json").write_text(text)


def write_question(directory: Path, shape: Shape, text: dict[str, Any], vision: dict[str, Any], seed: int = 0) -> None:
    """Writes ``policy/`` and ``reference/`` without weights, for sides that draw them, and ``group.npz``."""
    config = {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl"}
    for name in ("policy", "reference"):
        (directory / name).mkdir(parents=True)
        (directory / name / "config.json").write_text(json.dumps(config | text | SPECIAL | {"vision_config": vision}))
    np.savez(directory / "group.npz", **make_group(shape, np.random.default_rng(seed)))


def make_group(shape: Shape, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A prompt with an image of noise, responses and their advantages."""
    units, before = (shape.image // UNIT) ** 2, 20
    after = shape.prompt - before - units - 2
    if after < 1:
        raise ValueError(f"a prompt of {shape.prompt} tokens: expected at least {units + before + 3}, for the picture")
    words = lambda *n: rng.integers(FIRST_TEXT_ID, TEXT["vocab_size"], n)  # noqa: E731
    picture = [SPECIAL["vision_start_token_id"], *[SPECIAL["image_token_id"]] * units, SPECIAL["vision_end_token_id"]]
    # In transformers' patch order: merged units in raster order. Both frames of a still image are the same.
    patches = rng.standard_normal((units * 4, 3, 1, 14 * 14)).repeat(2, axis=2)
    return {
        "prompt": np.concatenate([words(before), picture, words(after)]).astype(np.int32),
        "responses": words(shape.group, shape.response).astype(np.int32),
        "advantages": rng.standard_normal(shape.group).astype(np.float32),
        "patches": patches.reshape(units * 4, -1).astype(np.float32),
        "grid": np.array([shape.image // 14, shape.image // 14]),
    }


class Side:
    """A process that holds one side's policy."""

    def __init__(self, module: str, directory: Path, settings: Settings) -> None:
        platform = {"cpu": "cpu", "gpu": "cuda"}[settings.device]
        environment = os.environ | {"OMP_NUM_THREADS": str(settings.cores), "JAX_PLATFORMS": platform}
        if settings.device == "gpu":
            environment = GPU_ENVIRONMENT | environment
        command = [sys.executable, "-m", module, str(directory), json.dumps(asdict(settings))]
        self._child = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, what: str, **how: Any) -> dict[str, Any]:
        """Sends the side a request and returns its answer."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(json.dumps({"what": what, **how}) + "\n")
        self._child.stdin.flush()
        answer = self._child.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self._child.args[2]} ended with code {self._child.wait()} at {what!r}")
        return json.loads(answer)

    def close(self) -> None:
        """Ends the process."""
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait()


@contextmanager
def side(module: str, directory: Path, settings: Settings) -> Iterator[Side]:
    """One side, "benchmarks.jax_side" or "benchmarks.torch_side"."""
    child = Side(module, directory, settings)
    try:
        yield child
    finally:
        child.close()


@contextmanager
def sides(directory: Path, settings: Settings) -> Iterator[tuple[Side, Side]]:
    """Our side and PyTorch's, at the same time."""
    with (
        side("benchmarks.jax_side", directory, settings) as ours,
        side("benchmarks.torch_side", directory, settings) as peer,
    ):
        yield ours, peer


def turns(rounds: int, sides: dict[str, T]) -> Iterator[tuple[str, T]]:
    """Yields names and sides, ``rounds`` times; the order is reversed in every other round."""
    for number in range(rounds):
        yield from list(sides.items())[:: -1 if number % 2 else 1]


def take_turns(ours: Side, peer: Side, rounds: int, what: str, **how: Any) -> dict[str, list[dict[str, Any]]]:
    """Runs a request on both sides in turns; returns their answers by "ours" and "peer".

    In its turn a side runs the request twice, and only the second time counts. As in a real run, that follows the same
    work. The first time follows the other side's turn, after which the memory must be mapped anew, page by page.
    """
    rows: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
    for name, side in turns(rounds, {"ours": ours, "peer": peer}):
        side(what, **how)
        rows[name].append(side(what, **how))
    return rows


def reset_peak() -> None:
    """Resets the process's peak memory."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_gib() -> float:
    """The process's peak memory since ``reset_peak``, in GiB."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 2**20


def machine(*packages: str) -> dict[str, Any]:
    """The machine, library versions and command of a measurement."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    versions = {name: version(name) for name in ("jax", "flax", *packages)}
    return {
        "command": " ".join(sys.orig_argv[1:]),
        "processor": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": versions,
    }
