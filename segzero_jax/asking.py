"""A policy that can be asked: any checkpoint, with all that its weights do not say of themselves, and one response."""

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
# By this file an export of a run is known as one; it says of which run, and with what its policy is to be asked and its
# answers are to be scored.
ORIGIN = "segzero_jax.json"
_ASKED = (
    *("model.compute_dtype", "data.image_size", "data.resampling", "data.prompt"),
    *("rollout.max_prompt_tokens", "rollout.max_response_tokens"),
    *("rollout.temperature", "rollout.top_p", "rollout.top_k"),
    *("reward.recipe", "reward.mask_iou_weight", "reward.mask_iou_mode", "reward.local_model"),
)
# What other Hugging Face directories do not say of themselves: how VisionReasoner's released checkpoints were trained.
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
_WATCHED_TOKENS = 8  # whoever watches a response is shown it in parts of so many tokens
_UNIT = 28  # pixels along the side of what becomes one image token


@dataclass(frozen=True)
class Loaded:
    """A policy that can be asked.

    Attributes:
      name: where it comes from, a run's step included.
      config: of its run, or what stands in for one; ``data`` and ``rollout`` say how it is asked.
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
        """How its tokens are chosen."""
        how = make_sampling(self.config.rollout, self.processor)
        return how._replace(repetition_penalty=self.repetition_penalty)


def find_checkpoints(given: Sequence[str | None]) -> list[str]:
    """What several ``--checkpoint`` mean: as ``find_checkpoint``, and ``RUN/checkpoints`` stands for all its steps."""
    found: list[str] = []
    for text in given:
        folder = epath.Path(text or "").expanduser()
        steps = complete_steps(folder) if folder.name == "checkpoints" else []
        found += [str(folder / str(step)) for step in steps] or [find_checkpoint(text)]
    return list(dict.fromkeys(found))


def find_checkpoint(given: str | None) -> str:
    """What ``--checkpoint`` means: a run directory stands for its newest step, nothing for the toy run or "toy"."""
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
      image_size, prompt: take the place of the run's own ``data.image_size`` and ``data.prompt``.
      repetition_penalty: see ``Sampling``.

    Raises:
      CheckpointError: there is no such policy, or it is damaged.
      MeshError: it does not divide over the mesh.
      ConfigError: the picture size or the wording is none.
    """
    keep_compiled()
    released = _as_released(name, prompt) if name != "toy" and is_checkpoint(name) else None
    # A run's precision is known only once it is read.
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
    """What an export of a run says in ``ORIGIN`` of how its policy is asked and scored, by dotted key."""
    # The model of a local server, where the run had none, is not what scored.
    return {key: attrgetter(key)(config) for key in _ASKED} | {"reward.local_model": default_sam(config)}


def _as_released(name: str, prompt: str | None) -> Config:
    """How a Hugging Face checkpoint was trained: as its export says, else as the released ones of its name were.

    Args:
      prompt: the wording that it is asked in anyway; a known one goes with a recipe, else the name decides.
    """
    settings: dict[str, Any] = {**_RELEASED, "model.path": name}
    directory = resolve(name)
    named = any(_SEG_ZERO_NAME.search(_model_name(path)) for path in (directory.absolute(), directory.resolve()))
    if prompt == "seg_zero" or (named and prompt not in WORDINGS):
        settings |= _SEG_ZERO
    origin = directory / ORIGIN
    if origin.is_file():
        try:
            # What an export of an earlier version does not say is as by default.
            unsaid = {key: attrgetter(key)(Config()) for key in ("reward.mask_iou_weight", "data.resampling")}
            settings |= {**unsaid, **json.loads(origin.read_text()).get("asked", {})}
        except (ValueError, AttributeError, TypeError):
            raise CheckpointError(f"{origin}: not what segzero_jax.export writes; export again, or delete it") from None
    return configs.replace(Config(), **settings)


def _model_name(directory: Path) -> str:
    """What a directory says of whose model it holds; in the hub's cache ``models--ORG--NAME/snapshots/HASH`` does."""
    named = directory.parent.parent if directory.parent.name == "snapshots" else directory
    return named.name.rpartition("--")[2]


def load_processor(config: Config, name: str) -> Processor:
    """The processor of ``model.path``; what it lacks is said of ``name``. Raises CheckpointError."""
    data, limit = config.data, config.rollout.max_prompt_tokens
    try:
        return Processor.load(config.model.path, data.image_size, data.prompt, limit, data.resampling)
    except (ValueError, KeyError, OSError) as error:  # missing or damaged tokenizer.json, preprocessor_config.json
        raise CheckpointError(f"{name}: no tokenizer or picture settings for it: {error}") from None


def make_sampling(config: RolloutConfig, processor: Processor) -> Sampling:
    """How a configuration says that groups are sampled, with the tokenizer's special ids."""
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
    """The configuration with another picture size, whose tokens come on top of the prompt's limit, or wording."""
    before = (config.data.image_size // _UNIT) ** 2
    after = ((image_size or config.data.image_size) // _UNIT) ** 2
    changes: dict[str, Any] = {"rollout.max_prompt_tokens": config.rollout.max_prompt_tokens + after - before}
    if image_size is not None:
        changes["data.image_size"] = image_size
    if prompt is not None:
        changes["data.prompt"] = prompt
    return configs.replace(config, **changes)


def default_sam(config: Config) -> str:
    """The SAM 2 that a policy was trained with; the best one where it was trained with none, or with one elsewhere.

    So it is where that one was the toy's on other pictures than the toy set's, which it knows nothing of.
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
      seed: None for the most probable tokens, else of the draw.
      temperature: of the draw; the run's own by default, like top-p and top-k.
      watch: is given the text so far whenever there are some tokens more.

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
            watch(text.rstrip("\N{REPLACEMENT CHARACTER}"))  # a character whose other bytes are still to come
    return text, bool(drawn.finished_bg[0, 0])
