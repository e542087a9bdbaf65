"""One prompt group at Seg-Zero's shapes, for measuring beside PyTorch: checkpoints both sides load, and one question.

The policy is a Qwen2.5-VL of 46 M parameters in float32, written by transformers with random weights; the reference is
another of the same dimensions. The picture has 840 x 840 pixels, 900 of the prompt's tokens. Each side runs in a
process of its own (``benchmarks/jax_side.py``, ``benchmarks/torch_side.py``) and does one thing at a time, when it is
told to, so that rounds of both alternate and memory is counted apart.
"""

import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
IMAGE, UNIT = 840, 28
# Ids below are special in one way or another.
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


class Unequal(Exception):
    """The two sides do not compute the same thing: their times mean nothing."""


@dataclass(frozen=True)
class Shape:
    """Tokens of the prompt and of each response, responses of the group, and pixels along the picture's side."""

    prompt: int = 1150
    response: int = 150
    group: int = 8
    image: int = IMAGE


def need(module: str, extra: str) -> None:
    """Ends the benchmark with one line where a peer is not installed."""
    if importlib.util.find_spec(module) is None:
        sys.exit(f"{module} is not installed: pip install -e '.[{extra}]'")


def write(directory: Path, shape: Shape, seed: int = 0) -> None:
    """Writes ``policy/`` and ``reference/`` in the hub's form, and ``group.npz``."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl"}
    text = json.dumps(config | TEXT | SPECIAL | {"vision_config": VISION})
    for number, name in enumerate(("policy", "reference")):
        where = directory / name
        where.mkdir(parents=True)
        (where / "config.json").write_text(text)
        torch.manual_seed(seed + number)
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_pretrained(where)).float()
        model.save_pretrained(where)
        (where / "config.json").write_text(text)
    rng = np.random.default_rng(seed)
    units = (shape.image // UNIT) ** 2
    before = 20
    after = shape.prompt - before - units - 2
    if after < 1:
        raise ValueError(f"a prompt of {shape.prompt} tokens: expected at least {units + before + 3}, for the picture")
    words = lambda *n: rng.integers(FIRST_TEXT_ID, TEXT["vocab_size"], n)  # noqa: E731
    picture = [SPECIAL["vision_start_token_id"], *[SPECIAL["image_token_id"]] * units, SPECIAL["vision_end_token_id"]]
    np.savez(
        directory / "group.npz",
        prompt=np.concatenate([words(before), picture, words(after)]).astype(np.int32),
        responses=words(shape.group, shape.response).astype(np.int32),
        advantages=rng.standard_normal(shape.group).astype(np.float32),
        # As transformers orders them: raster order of merged units, both frames of a still picture alike.
        patches=rng.standard_normal((units * 4, 3, 1, 14 * 14)).repeat(2, axis=2).reshape(units * 4, -1).astype("f4"),
        grid=np.array([shape.image // 14, shape.image // 14]),
    )


class Side:
    """A process that holds one side's policy."""

    def __init__(self, module: str, directory: Path, threads: int) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-m", module, str(directory), str(threads)]
        self._child = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, what: str, **how: Any) -> dict[str, Any]:
        """Has the side do something; what it tells."""
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
def sides(directory: Path, threads: int) -> Iterator[tuple[Side, Side]]:
    """Ours and PyTorch's."""
    ours = Side("benchmarks.jax_side", directory, threads)
    peer = Side("benchmarks.torch_side", directory, threads)
    try:
        yield ours, peer
    finally:
        ours.close()
        peer.close()


def reset_peak() -> None:
    """From here on the process's peak memory is counted anew."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_gib() -> float:
    """The most memory that the process has held since."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 2**20


def machine(*packages: str) -> dict[str, Any]:
    """Where and with what something was measured."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    versions = {name: version(name) for name in ("jax", "flax", *packages)}
    return {"processor": names[0] if names else platform.machine(), "cores": os.cpu_count(), "versions": versions}
