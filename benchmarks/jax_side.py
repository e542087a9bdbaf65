"""Our side of ``benchmarks/peer_group.py``: the package's own passes over one prompt and its responses."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peer_group import SPECIAL, VISION, Settings, peak_gib, reset_peak
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
from segzero_jax.mesh import ROLLOUT, TRAIN, make_mesh
from segzero_jax.model import load_hf
from segzero_jax.model.attention import choose_kernel
from segzero_jax.model.dims import Dims, from_hf
from segzero_jax.model.policy import ForwardConfig, Policy
from segzero_jax.model.weights import file_tensors
from segzero_jax.patches import window_order
from segzero_jax.processor import mrope_positions
from segzero_jax.rollout import Sampling, padding_multiple, prefill_prompts, rollout_layout, sample
from segzero_jax.types import PromptBatch, Rollout


def read_prompt(group: Any, multiple: int = 1) -> PromptBatch:
    """The question in the processor's form, padded to a multiple, from patches in transformers' order."""
    rows, columns = (int(n) for n in group["grid"])
    merge, window = VISION["spatial_merge_size"], VISION["window_size"] // VISION["patch_size"]
    raster_s, unit_k = window_order(rows, columns, merge, window)
    tokens = group["prompt"]
    positions, following = mrope_positions(tokens, SPECIAL["image_token_id"], [(rows // merge, columns // merge)])
    width = group["patches"].shape[1]
    patches = np.zeros((len(raster_s) // merge**2, merge**2, width), np.float32)
    patches[unit_k] = group["patches"].reshape(-1, merge**2, width)
    where = np.stack(np.divmod(np.maximum(raster_s, 0), columns), axis=1)
    image_index = np.full(len(tokens), -1, np.int32)
    image_index[tokens == SPECIAL["image_token_id"]] = unit_k
    more = (0, -len(tokens) % multiple)
    return PromptBatch(
        tokens_bp=np.pad(tokens, more, constant_values=SPECIAL["pad_token_id"])[None],
        length_b=np.array([len(tokens)], np.int32),
        positions_b3p=np.pad(positions, ((0, 0), more))[None],
        next_position_b=np.array([following], np.int32),
        image_index_bp=np.pad(image_index, more, constant_values=-1)[None],
        patches_bisc=patches.reshape(1, 1, -1, width),
        patch_hw_bis2=where[None, None].astype(np.int32),
        patch_valid_bis=(raster_s >= 0)[None, None],
    )


def load(directory: Path, settings: Settings, seed: int) -> tuple[Policy, Dims]:
    """The checkpoint, or random weights of its dimensions if ``settings.drawn``."""
    if not settings.drawn:
        return load_hf(directory)
    dims = from_hf(json.loads((directory / "config.json").read_text()))
    return Policy(dims, TRAIN, jax.random.key(seed)), dims


class JaxSide:
    """The prompt group, repeated ``settings.prompts`` times."""

    def __init__(self, directory: Path, settings: Settings) -> None:
        group = np.load(directory / "group.npz")
        repeat = lambda x: np.repeat(x, settings.prompts, axis=0)  # noqa: E731
        responses = repeat(group["responses"][None])
        self.settings, dtype = settings, jnp.dtype(settings.dtype)
        # Cast before the policy is loaded, to save memory.
        reference, self.dims = load(directory / "reference", settings, 1)
        narrow = jax.jit(lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree))
        self.reference = narrow(reference)
        del reference
        policy, _ = load(directory / "policy", settings, 0)
        train = TrainConfig(lr=1e-6, weight_decay=1e-2, max_grad_norm=1.0, moment_dtype=settings.moment_dtype)
        self.optimizer = make_optimizer(train, freeze_vision=False)
        self.state: TrainState = initial_state(policy, self.optimizer)
        prompt = read_prompt(group, padding_multiple(len(group["prompt"])))
        self.prompts = jax.device_put(jax.tree.map(repeat, prompt))
        shape = responses.shape
        self.rollout = Rollout(
            jnp.asarray(responses),
            np.full(shape[:2], shape[2], np.int32),
            np.zeros(shape, np.float32),
            np.ones(shape[:2], bool),
        )
        self.advantages = repeat(group["advantages"][None])
        kernel = choose_kernel(jax.sharding.get_mesh(), dtype)
        self.train_fwd = ForwardConfig(self.dims, TRAIN, dtype, settings.remat, kernel, one_loop=settings.remat)
        self.rollout_fwd = self.train_fwd._replace(layout=ROLLOUT, remat=False)
        self.to_rollout = rollout_layout(self.dims, dtype)
        # transformers bans no tokens.
        self.loss_config = LossConfig(GrpoConfig(), 1.0, banned_ids=(), freeze_vision=False, max_tokens=shape[2])

    def _peak(self) -> float:
        statistics = jax.devices()[0].memory_stats() if self.settings.device == "gpu" else None
        return statistics["peak_bytes_in_use"] / 2**30 if statistics else peak_gib()

    def learn(self, gradients: str = "") -> dict[str, float]:
        """Runs one step; writes the clipped gradients (ten times AdamW's first moment) to the file ``gradients``."""
        reset_peak()
        times = [time.perf_counter()]
        kept = np.ones(self.advantages.shape, bool)
        fwd, count = self.train_fwd, self.settings.prompts // self.settings.together
        forward = {"fwd": fwd._replace(remat=False), "loss_config": self.loss_config}
        ref = policy_logps(self.reference, self.prompts, self.rollout.tokens_bgr, **forward).block_until_ready()
        times.append(time.perf_counter())
        batch = UpdateBatch(self.prompts, self.rollout, self.advantages, kept, ref)
        self.state, metrics = update(
            self.state, batch, optimizer=self.optimizer, fwd=fwd, loss_config=self.loss_config, micro_batches=count
        )
        jax.block_until_ready((self.state, metrics))
        times.append(time.perf_counter())
        if gradients:
            first_moment = self.state.opt_state[1][0].mu
            found = file_tensors(jax.tree.map(lambda x: x / 0.1, first_moment), self.dims, np.float32)
            np.savez(gradients, **found)
        phases = dict(zip(("reference", "update"), np.diff(times).tolist(), strict=True))
        numbers = {name: float(metrics[name]) for name in ("loss", "kl", "grad_norm")}
        return {"old": 0.0, **phases, **numbers, "peak_gib": self._peak()}

    def generate(self, tokens: int) -> dict[str, object]:
        """Samples ``tokens`` tokens of every response to one prompt greedily; also returns the time to the first token.

        Both times include converting the weights' layout, which a step does once for all its prompts.
        """
        reset_peak()
        prompt = jax.tree.map(lambda x: x[:1], self.prompts)
        start = time.perf_counter()
        weights = jax.block_until_ready(self.to_rollout(self.state.params))
        times = [time.perf_counter()]
        for count in (1, tokens):
            sampling = Sampling(self.advantages.shape[1], count, (), 0, (), greedy=True)
            read = prefill_prompts(self.state.params, prompt, fwd=self.train_fwd._replace(remat=False))
            how = {"fwd": self.rollout_fwd, "sampling": sampling, "prefilled": read}
            made = sample(weights, prompt, jax.random.key(0), **how)
            made = jax.device_get(made.tokens_bgr[0])
            times.append(time.perf_counter())
        layout, (first, whole) = times[0] - start, np.diff(times).tolist()
        times = {"layout": layout, "first": layout + first, "whole": layout + whole}
        return {**times, "tokens": made.tolist(), "peak_gib": self._peak()}


def main() -> None:
    with jax.set_mesh(make_mesh("1x1")):
        side = JaxSide(Path(sys.argv[1]), Settings(**json.loads(sys.argv[2])))
        for line in sys.stdin:
            how = json.loads(line)
            print(json.dumps(getattr(side, how.pop("what"))(**how)), flush=True)


if __name__ == "__main__":
    main()
