"""PyTorch's side of ``benchmarks/peer_group.py``: transformers on the repeated layout, as TRL, EasyR1 and verl train.

Every response is a row of its own behind its own copy of the prompt and its picture. One step is the log-probabilities
under the sampling policy ("old"), those under the reference, and the update with AdamW.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from benchmarks.peer_group import peak_gib, reset_peak

CLIP, KL, NORM, LR, DECAY = 0.2, 5e-3, 1.0, 1e-6, 1e-2


class TorchSide:
    """One prompt group, repeated."""

    def __init__(self, directory: Path) -> None:
        load = Qwen2_5_VLForConditionalGeneration.from_pretrained
        self.policy, self.reference = (
            load(directory / name, dtype=torch.float32, attn_implementation="sdpa") for name in ("policy", "reference")
        )
        group = np.load(directory / "group.npz")
        self.responses = torch.from_numpy(group["responses"]).long()
        self.advantages = torch.from_numpy(group["advantages"])[:, None]
        count = len(self.responses)
        self.prompts = torch.from_numpy(group["prompt"]).long()[None].repeat(count, 1)
        self.pixels = torch.from_numpy(group["patches"]).repeat(count, 1)
        self.grid = torch.tensor([[1, *group["grid"].tolist()]] * count)
        # transformers' own defaults are AdamW's; these are Seg-Zero's.
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
        return logits.log_softmax(-1).gather(-1, self.responses[..., None])[..., 0]

    def learn(self, gradients: str = "") -> dict[str, float]:
        """One step; writes the clipped gradients to a file where one is named."""
        reset_peak()
        times = [time.perf_counter()]
        with torch.no_grad():
            old = self._logps(self.policy)
            times.append(time.perf_counter())
            ref = self._logps(self.reference)
        times.append(time.perf_counter())
        new = self._logps(self.policy)
        ratio = torch.exp(new - old)
        surrogate = -torch.min(ratio * self.advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * self.advantages)
        d = ref - new
        kl = (d.exp() - d - 1).clamp(-10, 10)
        loss = (surrogate + KL * kl).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), NORM)
        if gradients:
            named = self.policy.named_parameters()
            saved = {_hub_name(name): value.grad.numpy() for name, value in named if value.grad is not None}
            np.savez(gradients, **saved)
        self.optimizer.step()
        self.optimizer.zero_grad()
        times.append(time.perf_counter())
        phases = dict(zip(("old", "reference", "update"), np.diff(times).tolist(), strict=True))
        return {**phases, "loss": loss.item(), "kl": kl.mean().item(), "grad_norm": norm.item(), "peak_gib": peak_gib()}

    @torch.no_grad()
    def generate(self, tokens: int) -> dict[str, object]:
        """``tokens`` new tokens of every row, greedily, and the time that the first of them takes."""
        reset_peak()
        times = [time.perf_counter()]
        for count in (1, tokens):
            out = self.policy.generate(
                **self._inputs(self.prompts),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                use_cache=True,
            )
            times.append(time.perf_counter())
        first, whole = np.diff(times).tolist()
        made = out[:, self.prompts.shape[1] :]
        return {"first": first, "whole": whole, "tokens": made.tolist(), "peak_gib": peak_gib()}


def _hub_name(name: str) -> str:
    """transformers' name of a parameter as released checkpoints have it."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def main() -> None:
    torch.set_num_threads(int(sys.argv[2]))
    side = TorchSide(Path(sys.argv[1]))
    for line in sys.stdin:
        how = json.loads(line)
        print(json.dumps(getattr(side, how.pop("what"))(**how)), flush=True)


if __name__ == "__main__":
    main()
