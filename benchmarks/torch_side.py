"""PyTorch's side of ``benchmarks/peer_group.py``: transformers on the repeated layout, as TRL, EasyR1 and verl train.

Every response is a separate row with its own copy of the prompt and the image. One step is the log-probabilities under
the sampling policy ("old"), those under the reference, and the update with AdamW.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from benchmarks.peer_group import Settings, peak_gib, reset_peak

CLIP, KL, NORM, LR, DECAY = 0.2, 5e-3, 1.0, 1e-6, 1e-2


def load(directory: Path, settings: Settings) -> Qwen2_5_VLForConditionalGeneration:
    """The checkpoint, or random weights of its dimensions if ``settings.drawn``."""
    how = {"dtype": getattr(torch, settings.dtype), "attn_implementation": "sdpa"}
    if not settings.drawn:
        return Qwen2_5_VLForConditionalGeneration.from_pretrained(directory, **how)
    with torch.device({"cpu": "cpu", "gpu": "cuda"}[settings.device]):
        config = Qwen2_5_VLConfig.from_pretrained(directory)
        return Qwen2_5_VLForConditionalGeneration._from_config(config, **how)


class TorchSide:
    """One prompt group, repeated."""

    def __init__(self, directory: Path, settings: Settings) -> None:
        self.device = torch.device({"cpu": "cpu", "gpu": "cuda"}[settings.device])
        self.policy, self.reference = (
            load(directory / name, settings).to(self.device).eval() for name in ("policy", "reference")
        )
        self.remat = settings.remat
        self.micro_batches = settings.prompts
        group = {
            name: torch.from_numpy(value).to(self.device) for name, value in np.load(directory / "group.npz").items()
        }
        self.responses = group["responses"].long()
        self.advantages = group["advantages"][:, None]
        count = len(self.responses)
        self.prompts = group["prompt"].long()[None].repeat(count, 1)
        self.pixels = group["patches"].repeat(count, 1)
        self.grid = torch.tensor([[1, *group["grid"].tolist()]] * count, device=self.device)
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=LR, weight_decay=DECAY)

    def _inputs(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == self.policy.config.image_token_id).int(),
            "pixel_values": self.pixels,
            "image_grid_thw": self.grid,
        }

    def _logps(self, model: Qwen2_5_VLForConditionalGeneration) -> torch.Tensor:
        ids = torch.cat([self.prompts, self.responses], dim=1)
        logits = model(**self._inputs(ids), logits_to_keep=self.responses.shape[1] + 1).logits[:, :-1]
        return logits.float().log_softmax(-1).gather(-1, self.responses[..., None])[..., 0]

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _reset(self) -> None:
        reset_peak()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def _peak(self) -> float:
        return torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else peak_gib()

    def learn(self, gradients: str = "") -> dict[str, float]:
        """Runs one step; writes the clipped gradients to the file ``gradients`` if given."""
        if self.remat:
            self.policy.gradient_checkpointing_enable({"use_reentrant": False})
            self.policy.train()
        self._reset()
        times = [self._now()]
        with torch.no_grad():
            old = [self._logps(self.policy) for _ in range(self.micro_batches)]
            times.append(self._now())
            ref = [self._logps(self.reference) for _ in range(self.micro_batches)]
        times.append(self._now())
        total, divergence = 0.0, 0.0
        for old_logps, ref_logps in zip(old, ref, strict=True):
            new = self._logps(self.policy)
            ratio = torch.exp(new - old_logps)
            surrogate = -torch.min(ratio * self.advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * self.advantages)
            d = ref_logps - new
            kl = (d.exp() - d - 1).clamp(-10, 10)
            loss = (surrogate + KL * kl).mean() / self.micro_batches
            loss.backward()
            total += loss.item()
            divergence += kl.mean().item() / self.micro_batches
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), NORM)
        if gradients:
            named = self.policy.named_parameters()
            saved = {_hub_name(name): value.grad.numpy() for name, value in named if value.grad is not None}
            np.savez(gradients, **saved)
        self.optimizer.step()
        self.optimizer.zero_grad()
        times.append(self._now())
        phases = dict(zip(("old", "reference", "update"), np.diff(times).tolist(), strict=True))
        return {**phases, "loss": total, "kl": divergence, "grad_norm": norm.item(), "peak_gib": self._peak()}

    @torch.no_grad()
    def generate(self, tokens: int) -> dict[str, object]:
        """Samples ``tokens`` new tokens of every row greedily; also returns the time to the first token."""
        if self.remat:
            # With gradient checkpointing, transformers keeps no KV cache.
            self.policy.gradient_checkpointing_disable()
            self.policy.eval()
        self._reset()
        times = [self._now()]
        for count in (1, tokens):
            out = self.policy.generate(
                **self._inputs(self.prompts),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                use_cache=True,
            )
            times.append(self._now())
        first, whole = np.diff(times).tolist()
        # No layout change: the weights stay as they are for training.
        made = out[:, self.prompts.shape[1] :]
        return {"layout": 0.0, "first": first, "whole": whole, "tokens": made.tolist(), "peak_gib": self._peak()}


def _hub_name(name: str) -> str:
    """Converts transformers' name of a parameter to its key in released checkpoints."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def main() -> None:
    settings = Settings(**json.loads(sys.argv[2]))
    torch.set_num_threads(settings.cores)
    side = TorchSide(Path(sys.argv[1]), settings)
    for line in sys.stdin:
        how = json.loads(line)
        print(json.dumps(getattr(side, how.pop("what"))(**how)), flush=True)


if __name__ == "__main__":
    main()
