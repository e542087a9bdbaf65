"""The configuration of a run: frozen dataclasses. ``Config()`` is the embedded toy run."""

import itertools
from dataclasses import field
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

_STRICT = ConfigDict(extra="forbid")
# The answer format that each wording asks for ("toy": the one its policy gives). A custom wording may ask for either.
LIST_FORM, ONE_FORM = "a list of objects", "one object with two points"
ASKED = {"toy": LIST_FORM, "seg_zero": ONE_FORM, "vision_reasoner": LIST_FORM}
# Where the question goes in a wording.
QUESTION = "{question}"
Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
# JAX takes random seeds of 32 bits.
Seed = Annotated[int, Field(ge=0, lt=2**32)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Above0 = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line: the key, the value, what was expected."""


@dataclass(frozen=True, config=_STRICT)
class RunConfig:
    """Where a run lives.

    Attributes:
      dir: the run directory, on this machine's disk.
      checkpoint_dir: where checkpoints go, a path or gs://bucket/path; empty means inside ``dir``.
    """

    dir: Text = "runs/toy"
    checkpoint_dir: str = ""


@dataclass(frozen=True, config=_STRICT)
class ModelConfig:
    """The policy.

    Attributes:
      path: a Hugging Face checkpoint: a directory, a hub id, or "toy" for the one inside the package.
      compute_dtype: dtype of activations and of the weights that rollout reads, "float32" or "bfloat16"; master weights
        are always float32.
      remat: recompute each block in the backward pass instead of keeping its activations.
      freeze_vision: leave the vision tower and merger untouched.
      lora_rank: rank of the low-rank adapters (LoRA), which are trained in place of the decoder's matrices; all other
        weights are frozen. 0 trains all weights.
      lora_alpha: an adapter's output is scaled by lora_alpha / lora_rank.
    """

    path: Text = "toy"
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False
    freeze_vision: bool = False
    lora_rank: Count = 0
    lora_alpha: Above0 = 32.0

    @property
    def vision_stays(self) -> bool:
        """Whether image embeddings are the same in all steps."""
        return self.freeze_vision or self.lora_rank > 0

    @property
    def lora_scale(self) -> float | None:
        """The scale of an adapter's output; None without LoRA."""
        return self.lora_alpha / self.lora_rank if self.lora_rank else None


@dataclass(frozen=True, config=_STRICT)
class DataConfig:
    """The data sets, images and prompts.

    Attributes:
      name: "toy", or a data set built by ``python -m segzero_jax.data.build``; several, separated by commas, are
        shuffled together, and one named twice counts twice.
      dir: where built data sets are kept.
      image_size: images are squashed to a square of this many pixels a side; answers are in this frame.
      resampling: the filter that resizes them; the released evaluations of Seg-Zero and VisionReasoner use bilinear.
      prompt: the wording of the question: "toy", "seg_zero", "vision_reasoner", or a custom text that contains
        "{question}". ``reward.recipe`` has to score the answer format that it asks for.
      workers: processes on each host that prepare batches ahead; 0 prepares them in threads of the trainer.
      eval_splits: held-out splits to evaluate: "val" is a split of this data set, or of the first if there are several;
        "ReasonSeg/val" is a split of another.
    """

    # Spaces around commas do not make a different configuration.
    name: Annotated[Text, AfterValidator(lambda text: ",".join(map(str.strip, text.split(","))))] = "toy"
    dir: Text = "~/.cache/segzero_jax"
    image_size: Annotated[int, Field(gt=0, multiple_of=28)] = 112
    resampling: Literal["bicubic", "bilinear"] = "bicubic"
    prompt: Text = "toy"
    workers: Count = 0
    eval_splits: tuple[Text, ...] = ("val", "heldout_pairs", "heldout_relations", "heldout_crowd")

    @property
    def names(self) -> tuple[str, ...]:
        """The data sets of ``name``, in its order."""
        return tuple(self.name.split(","))


@dataclass(frozen=True, config=_STRICT)
class RolloutConfig:
    """How responses are sampled.

    Attributes:
      group_size: responses per prompt.
      temperature: divides the logits, in sampling and in training.
      top_p: sample from the most likely tokens that hold this much probability.
      top_k: sample from this many most likely tokens; 0 means all.
      max_prompt_tokens: a longer prompt is rejected, never truncated.
      max_response_tokens: responses are truncated to this length.
      max_batches: batches sampled per step at most: groups whose rewards are all equal have no gradient and are
        replaced by groups of the next batch (DAPO's dynamic sampling); 1 trains on the batch as it is.
    """

    group_size: Annotated[int, Field(ge=2)] = 8
    temperature: Above0 = 1.0
    top_p: Fraction = 1.0
    top_k: Count = 0
    max_prompt_tokens: Positive = 64
    max_response_tokens: Positive = 64
    max_batches: Positive = 1


@dataclass(frozen=True, config=_STRICT)
class RewardConfig:
    """How responses are scored.

    Attributes:
      server: "local" starts a SAM 2 server beside the trainer, "none" scores text only, else "host:port[,host:port]".
      recipe: "seg_zero_soft", "seg_zero_strict", "seg_zero_soft_accuracy", "seg_zero_no_thinking", "vision_reasoner" or
        "sam_r1"; see docs/rewards.md.
      functions: custom reward functions, "module:function", whose values are added. See docs/rewards.md.
      mask_iou_weight: weight of the SAM 2 mask IoU component added to the recipe's own; 0 leaves it out.
      mask_iou_mode: the component's form: "raw" is the IoU itself, "threshold" is 1 above 0.5, "tiered" is SAM-R1's.
      local_model: the SAM 2 that a local server loads: a hub id, a directory, or "toy", which only knows the toy set.
      timeout_s: timeout of one call for a group's scores; then it is sent again.
      missing: what happens to a group that the service did not score in time while it scored others: the step waits
        for it, "wait", or its responses are left out of the loss, "drop".
      checkpoint_after_s: after this long without any answer, a checkpoint of the last finished step is saved.
      patience_s: after this long the run ends, with exit code 3.
      ca_file: PEM certificates that the servers' are verified against; turns TLS on.
      cert_file, key_file: the trainer's own certificate and key in PEM, for servers that require them.
      token_file: holds the token that servers require; without TLS it is sent to this machine only.
      tls_name: the name in the servers' certificates where it differs from the host in ``server``.
    """

    server: Text = "local"
    recipe: Literal[
        "seg_zero_soft",
        "seg_zero_strict",
        "seg_zero_soft_accuracy",
        "seg_zero_no_thinking",
        "vision_reasoner",
        "sam_r1",
    ] = "vision_reasoner"
    functions: tuple[Text, ...] = ()
    mask_iou_weight: NonNegative = 1.0
    mask_iou_mode: Literal["raw", "threshold", "tiered"] = "raw"
    local_model: Text = "toy"
    timeout_s: Above0 = 120.0
    missing: Literal["wait", "drop"] = "wait"
    checkpoint_after_s: Above0 = 300.0
    patience_s: Above0 = 3600.0
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    token_file: str = ""
    tls_name: str = ""


@dataclass(frozen=True, config=_STRICT)
class GrpoConfig:
    """The loss. Defaults are the paper's, except for the toy run's KL.

    Attributes:
      iterations: training passes over each rollout (mu in DeepSeekMath).
      clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high]. With one update per rollout it is 1,
        and nothing is clipped.
      norm_adv_by_std: divide advantages by the standard deviation of their group's rewards.
      loss_mean: what is weighted equally: all "tokens" of an update, or all "responses"; with "limit" the sum over a
        response is divided by rollout.max_response_tokens, then averaged over responses.
      mask_truncated: leave responses that were truncated at the limit out of the loss.
      kl_coef: weight of the k3 estimate of KL(policy, reference); with 0 there is no reference policy.
      entropy_coef: weight of the entropy bonus.
      importance_cap: truncate the sampler-to-trainer importance weight here; 0 leaves the weight out.
    """

    iterations: Positive = 1
    clip_low: NonNegative = 0.2
    clip_high: NonNegative = 0.2
    kl_coef: NonNegative = 5e-3
    entropy_coef: NonNegative = 0.0
    importance_cap: NonNegative = 0.0
    norm_adv_by_std: bool = True
    loss_mean: Literal["tokens", "responses", "limit"] = "tokens"
    mask_truncated: bool = False


@dataclass(frozen=True, config=_STRICT)
class TrainConfig:
    """The optimizer and the schedule.

    Attributes:
      steps: total steps, one rollout each.
      batch_size: prompts per step.
      mini_batch_size: prompts per update; 0 is the whole batch: one update per rollout, unless grpo.iterations is more.
      micro_batch_size: prompts whose activations are in memory at once; gradients accumulate over micro-batches. A
        multiple of the number of devices saves waiting for links.
      lr: AdamW's learning rate after the warm-up.
      warmup_steps: updates of the linear warm-up; the first of N takes lr / N, the second 2 lr / N, and so on.
      lr_decay: the learning-rate schedule after the warm-up: "none", "linear" or "cosine".
      decay_steps: the number of updates, warm-up included, after which a decay reaches 0.
      beta1, beta2: decay rates of AdamW's first and second moments.
      weight_decay: AdamW's weight decay, applied to all trainable parameters.
      max_grad_norm: gradients are clipped to this global norm.
      moment_dtype: dtype of AdamW's first moment, "float32" or "bfloat16"; the second stays float32: with beta2 near 1
        a bfloat16 one would stall.
      checkpoint_every: steps between checkpoints; one is always written at the end.
      keep_checkpoints: number of newest checkpoints to keep; at least two, so that a damaged one leaves another.
      keep_best: also keep the checkpoint with the highest value of this metric: SPLIT/MODE/NUMBER of an evaluation, as
        in val/greedy/giou, or a key of metrics.jsonl; empty keeps the newest only.
    """

    steps: Positive = 120
    batch_size: Positive = 16
    mini_batch_size: Count = 0
    micro_batch_size: Positive = 16
    lr: NonNegative = 1e-4
    warmup_steps: Count = 0
    lr_decay: Literal["none", "linear", "cosine"] = "none"
    decay_steps: Count = 0
    beta1: Decay = 0.9
    beta2: Decay = 0.999
    weight_decay: NonNegative = 1e-2
    max_grad_norm: Above0 = 1.0
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    checkpoint_every: Positive = 50
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    keep_best: str = ""

    @property
    def update_size(self) -> int:
        """Prompts per update."""
        return self.mini_batch_size or self.batch_size

    @property
    def mini_batches(self) -> int:
        """Mini-batches in a batch, each with its own update."""
        return self.batch_size // self.update_size

    @property
    def micro_batches(self) -> int:
        """Micro-batches in an update, processed one after the other."""
        return self.update_size // self.micro_batch_size


@dataclass(frozen=True, config=_STRICT)
class EvalConfig:
    """Evaluation on held-out splits before, during and after training.

    Attributes:
      every: steps between evaluations; 0 evaluates only before and after training.
      examples: questions per split, one about every image before any image's second.
      samples: sampled answers per question, besides the greedy one.
    """

    every: Count = 0
    examples: Positive = 64
    samples: Positive = 8


@dataclass(frozen=True, config=_STRICT)
class WatchConfig:
    """When a run raises alarms, and when it ends itself.

    Attributes:
      max_skipped: this many steps in a row without a finite update end the run, with exit code 5.
      alarm_after: steps that a collapsed state lasts before it raises an alarm.
      entropy_floor: mean entropy per token, in nats, below which the policy counts as collapsed.
      kill_after_s: a phase that takes longer ends the process, with exit code 6; 0 only reports hangs.
    """

    max_skipped: Positive = 5
    alarm_after: Positive = 10
    entropy_floor: NonNegative = 0.01
    kill_after_s: NonNegative = 0.0


@dataclass(frozen=True, config=_STRICT)
class Config:
    """Everything a run depends on.

    Attributes:
      seed: random seed of the data order, of sampling and of initial values.
      mesh: the device mesh: 4x4 is fsdp x tensor, 2x4x4 data x fsdp x tensor.
    """

    seed: Seed = 0
    mesh: Text = "1x1"
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)

    @property
    def updates_per_rollout(self) -> int:
        return self.grpo.iterations * self.train.mini_batches

    @property
    def steps_that_learn(self) -> int:
        """Steps until a decay brings the learning rate to 0, if every step makes its updates (not known in advance)."""
        if self.train.lr_decay == "none":
            return self.train.steps
        return min(self.train.steps, -(-self.train.decay_steps // self.updates_per_rollout))

    def __post_init__(self) -> None:
        check_wording(self.data.prompt, "data.prompt=")
        sizes = [f"{name}_size" for name in ("batch", "mini_batch", "micro_batch")]
        sizes = [name for name in sizes if getattr(self.train, name)]
        for whole, part in itertools.pairwise(sizes):
            size, part_size = getattr(self.train, whole), getattr(self.train, part)
            if size % part_size:
                raise ConfigError(f"train.{whole}={size}: expected a multiple of train.{part}={part_size}")
        if self.train.lr_decay != "none" and self.train.decay_steps <= self.train.warmup_steps:
            raise ConfigError(
                f"train.decay_steps={self.train.decay_steps}: train.lr_decay={self.train.lr_decay} ends there, "
                f"expected more than train.warmup_steps={self.train.warmup_steps}"
            )
        if self.reward.recipe == "sam_r1" and self.reward.server == "none":
            raise ConfigError("reward.recipe=sam_r1: scores masks, expected reward.server=local or host:port, got none")
        if self.reward.server not in ("local", "none") and not all(map(_is_target, self.reward.server.split(","))):
            raise ConfigError(f"reward.server={self.reward.server}: expected local, none or host:port[,host:port]")


def check_wording(wording: str, key: str = "") -> None:
    """Raises ConfigError unless ``wording`` is a known name or contains "{question}"; ``key`` starts the message."""
    if wording not in ASKED and QUESTION not in wording:
        shown = " ".join(wording.split())
        shown = shown if len(shown) <= 60 else f"{shown[:60]}…"
        raise ConfigError(f"{key}{shown}: expected {', '.join(ASKED)} or a text with {QUESTION} where that goes")


def _is_target(target: str) -> bool:
    host, _, port = target.rpartition(":")
    return bool(host) and port.isascii() and port.isdigit() and 0 < int(port) < 65536
