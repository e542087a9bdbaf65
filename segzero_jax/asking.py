"""A policy ready to be asked: any checkpoint, with the settings that its weights do not record, and one response."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from segzero_jax import config as configs
from segzero_jax.checkpoint_paths import complete_steps, locate
from segzero_jax.compiled import keep_compiled
from segzero_jax.config import Config, RolloutConfig
from segzero_jax.hub import is_checkpoint
from segzero_jax.mesh import TRAIN
from segzero_jax.model.dims import Dims
from segzero_jax.model.forward import forward_config
from segzero_jax.model.policy import Policy
from segzero_jax.model.precision import use_compute_dtype
from segzero_jax.model.weights import CheckpointError, resolve
from segzero_jax.processor import Processor
from segzero_jax.prompt import WORDINGS
from segzero_jax.rollout import Sampling, padding_multiple, sample_in_parts
from segzero_jax.saved_policy import load_policy
from segzero_jax.types import Example

_DEFAULT_RUN = Path("runs/toy")
_LARGE_SAM = "facebook/sam2.1-hiera-large"
# This file marks an export of a run. It records which run, and the settings for asking the policy and scoring its
# answers.
ORIGIN = "segzero_jax.json"
_ASKED = (
    *("model.compute_dtype", "data.image_size", "data.resampling", "data.prompt"),
    *("rollout.max_prompt_tokens", "rollout.max_response_tokens"),
    *("rollout.temperature", "rollout.top_p", "rollout.top_k"),
    *("reward.recipe", "reward.mask_iou_weight", "reward.mask_iou_mode", "reward.local_model"),
)
# Settings that other Hugging Face directories do not record: those of VisionReasoner's released checkpoints.
_RELEASED = {
    "model.compute_dtype": "bfloat16",
    "data.image_size": 840,
    "data.resampling": "bilinear",
    "data.prompt": "vision_reasoner",
    "rollout.max_prompt_tokens": 1300,
    "rollout.max_response_tokens": 2000,
    "reward.mask_iou_weight": 0.0,
    "reward.local_model": _LARGE_SAM,
}
_SEG_ZERO = {"data.prompt": "seg_zero", "reward.recipe": "seg_zero_strict"}
_SEG_ZERO_NAME = re.compile("seg[-_ ]?zero", re.IGNORECASE)
_WATCHED_TOKENS = 8  # a watcher sees a response in increments of this many tokens
_UNIT = 28  # side of one image token, in pixels


@dataclass(frozen=True)
class Loaded:
    """A policy ready to be asked.

    Attributes:
      name: its source, including the step of a run.
      config: the configuration of its run, or a substitute; ``data`` and ``rollout`` determine how it is asked.
      repetition_penalty: see ``Sampling``.
    """

    name: str
    policy: Policy
    dims: Dims
    processor: Processor
    config: Config
    repetition_penalty: float = 1.0

    @property
    def sampling(self) -> Sampling:
        """How its tokens are sampled."""
        how = make_sampling(self.config.rollout, self.processor)
        return how._replace(repetition_penalty=self.repetition_penalty)


def find_checkpoints(given: Sequence[str | None]) -> list[str]:
    """Resolves several ``--checkpoint`` as ``find_checkpoint`` does; ``RUN/checkpoints`` stands for all its steps."""
    found: list[str] = []
    for text in given:
        folder = epath.Path(text or "").expanduser()
        steps = complete_steps(folder) if folder.name == "checkpoints" else []
        found += [str(folder / str(step)) for step in steps] or [find_checkpoint(text)]
    return list(dict.fromkeys(found))


def find_checkpoint(given: str | None) -> str:
    """Resolves ``--checkpoint``: a run directory means its newest step, None the toy run or "toy"."""
    if given is None:
        return _newest(_DEFAULT_RUN) or "toy"
    return given if is_checkpoint(given) else _newest(given) or given


def _newest(run: str | Path) -> str | None:
    located = locate(run)
    if located is None or located[1] is not None:
        return None
    directory, _ = located
    steps = complete_steps(directory)
    return str(directory / str(steps[-1])) if steps else None


def load(
    name: str, image_size: int | None = None, prompt: str | None = None, repetition_penalty: float = 1.0
) -> Loaded:
    """Loads a policy and its processor onto the ambient mesh.

    Args:
      name: a run's ``checkpoints/STEP``, a run directory, a Hugging Face directory, a hub id, or "toy".
      image_size, prompt: override the run's ``data.image_size`` and ``data.prompt``.
      repetition_penalty: see ``Sampling``.

    Raises:
      CheckpointError: there is no such policy, or it is damaged.
      MeshError: it does not divide over the mesh.
      ConfigError: the image size or the prompt wording is invalid.
    """
    keep_compiled()
    released = _as_released(name, prompt) if name != "toy" and is_checkpoint(name) else None
    # A run's precision is known only after it is read.
    dtype = use_compute_dtype(released.model.compute_dtype) if released else jnp.float32
    policy, dims, config = load_policy(name, dtype)
    if config is None:
        config = released or Config()
    else:
        dtype = use_compute_dtype(config.model.compute_dtype)
        policy = jax.tree.map(lambda x: x.astype(dtype), policy)
    config = _asked_differently(config, image_size, prompt)
    return Loaded(name, policy, dims, load_processor(config, name), config, repetition_penalty)


def asked(config: Config) -> dict[str, Any]:
    """The settings that an export stores in ``ORIGIN`` for asking and scoring its policy, by dotted key."""
    # Without a local server, the run's reward.local_model is not the model that scored.
    return {key: attrgetter(key)(config) for key in _ASKED} | {"reward.local_model": default_sam(config)}


def _as_released(name: str, prompt: str | None) -> Config:
    """The training settings of a Hugging Face checkpoint: its export's, else those of the releases of its name.

    Args:
      prompt: the wording it will be asked with; a known one implies a recipe, otherwise the name decides.
    """
    settings: dict[str, Any] = {**_RELEASED, "model.path": name}
    directory = resolve(name)
    named = any(_SEG_ZERO_NAME.search(_model_name(path)) for path in (directory.absolute(), directory.resolve()))
    if prompt == "seg_zero" or (named and prompt not in WORDINGS):
        settings |= _SEG_ZERO
    origin = directory / ORIGIN
    if origin.is_file():
        try:
            # Keys that an export of an earlier version lacks have their defaults.
            unsaid = {key: attrgetter(key)(Config()) for key in ("reward.mask_iou_weight", "data.resampling")}
            settings |= {**unsaid, **json.loads(origin.read_text()).get("asked", {})}
        except (ValueError, AttributeError, TypeError):
            raise CheckpointError(f"{origin}: not what segzero_jax.export writes; export again, or delete it") from None
    return configs.replace(Config(), **settings)


def _model_name(directory: Path) -> str:
    """The model's name, from its directory; in the hub's cache, NAME of ``models--ORG--NAME/snapshots/HASH``."""
    named = directory.parent.parent if directory.parent.name == "snapshots" else directory
    return named.name.rpartition("--")[2]


def load_processor(config: Config, name: str) -> Processor:
    """The processor of ``model.path``. Raises CheckpointError, which names ``name``, if it is missing or damaged."""
    data, limit = config.data, config.rollout.max_prompt_tokens
    try:
        return Processor.load(config.model.path, data.image_size, data.prompt, limit, data.resampling)
    except (ValueError, KeyError, OSError) as error:  # missing or damaged tokenizer.json, preprocessor_config.json
        raise CheckpointError(f"{name}: no tokenizer or picture settings for it: {error}") from None


def make_sampling(config: RolloutConfig, processor: Processor) -> Sampling:
    """The sampling of groups under a configuration, with the tokenizer's special ids."""
    return Sampling(
        group=config.group_size,
        max_tokens=config.max_response_tokens,
        end_ids=processor.end_ids,
        pad_id=processor.pad_id,
        banned_ids=processor.visual_ids,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
    )


def _asked_differently(config: Config, image_size: int | None, prompt: str | None) -> Config:
    """The configuration with another wording, or another image size whose tokens adjust the prompt limit."""
    before = (config.data.image_size // _UNIT) ** 2
    after = ((image_size or config.data.image_size) // _UNIT) ** 2
    changes: dict[str, Any] = {"rollout.max_prompt_tokens": config.rollout.max_prompt_tokens + after - before}
    if image_size is not None:
        changes["data.image_size"] = image_size
    if prompt is not None:
        changes["data.prompt"] = prompt
    return configs.replace(config, **changes)


def default_sam(config: Config) -> str:
    """The SAM 2 for a policy: the one that it was trained with, or hiera-large if that was remote, or none.

    Hiera-large also replaces the toy SAM 2 if the data did not include the toy set, the only images it knows. The toy
    policy always keeps its own.
    """
    mine, sam = config.model.path == "toy" or config.reward.server == "local", config.reward.local_model
    blind = sam == "toy" and config.model.path != "toy" and "toy" not in config.data.names
    return _LARGE_SAM if blind or not mine else sam


def respond(
    loaded: Loaded,
    example: Example,
    seed: int | None = None,
    temperature: float | None = None,
    watch: Callable[[str], None] | None = None,
) -> tuple[str, bool]:
    """The policy's response to one question.

    Args:
      loaded: on the ambient mesh.
      seed: seed for sampling; None for greedy decoding.
      temperature: sampling temperature; the run's own by default, like top-p and top-k.
      watch: called with the text so far after every few tokens.

    Returns:
      The text, and whether it ended by itself rather than at the length limit.

    Raises:
      ImageError, PromptTooLong: see ``Processor.encode``.
    """
    processor, rollout = loaded.processor, loaded.config.rollout
    sampling = loaded.sampling._replace(group=1, temperature=temperature or rollout.temperature, greedy=seed is None)
    batch = processor.batch([processor.encode(example)], multiple=padding_multiple(rollout.max_prompt_tokens))
    fwd = forward_config(loaded.dims, TRAIN, loaded.config.model)._replace(remat=False)
    parts = sample_in_parts(
        loaded.policy, batch, jax.random.key(seed or 0), fwd=fwd, sampling=sampling, tokens=_WATCHED_TOKENS
    )
    for drawn in parts:
        text = processor.decode(np.asarray(drawn.tokens_bgr)[0, 0, : drawn.length_bg[0, 0]])
        if watch is not None:
            watch(text.rstrip("\N{REPLACEMENT CHARACTER}"))  # an incomplete UTF-8 character
    return text, bool(drawn.finished_bg[0, 0])
