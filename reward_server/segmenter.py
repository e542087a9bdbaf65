"""SAM 2 behind one small interface: an image becomes an embedding, prompts become the highest-scored masks.

This is the only module that knows the ``sam2`` package (and its private names). Masks are those of
``SAM2ImagePredictor.predict(..., multimask_output=True)`` with the highest-scored of the three kept; two things are
done once instead of many times: all prompts of an image with equally many points go through the mask decoder
together, and only the kept mask is brought to the size of the image.

Prompts with different numbers of points are not padded to one length: SAM 2's padding points take part in the
decoder's attention, so masks would change.
"""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from safetensors.torch import load_file
from sam2.build_sam import HF_MODEL_ID_TO_FILENAMES, build_sam2
from sam2.modeling.sam2_base import SAM2Base
from sam2.sam2_image_predictor import SAM2ImagePredictor
from yaml import YAMLError

TOY = Path(__file__).parent / "assets" / "toy_sam2"
# Bounds the decoder's memory: hiera-large needs about 30 MB a prompt in bfloat16.
_PROMPTS_PER_CALL = 128


class ModelError(ValueError):
    """A model that cannot be loaded; the message is one line."""


@dataclass(frozen=True)
class Prompt:
    """One object: a box (x1, y1, x2, y2) and foreground points (x, y), in pixels of the image."""

    box: tuple[float, float, float, float]
    points: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Embedding:
    """An encoded image: SAM 2's features, finest first, and the picture's height and width."""

    levels: tuple[torch.Tensor, ...]
    height: int
    width: int

    @property
    def nbytes(self) -> int:
        return sum(level.nbytes for level in self.levels)


@dataclass(frozen=True)
class Masks:
    """One mask per candidate, the union over its objects.

    Attributes:
      masks: bool [candidates, height, width], on the model's device.
      scores: per candidate SAM 2's own estimate of the IoU, the mean over its objects; 0 without objects.
    """

    masks: torch.Tensor
    scores: tuple[float, ...]


def build_model(config: DictConfig | ListConfig) -> SAM2Base:
    """Builds the network that a SAM 2 configuration describes, with new weights."""
    return instantiate(config.model, _recursive_=True).eval()


class Segmenter:
    """A loaded SAM 2. Not thread-safe: one thread owns it.

    Attributes:
      name: as asked for.
      checkpoint_sha256: hexadecimal, of the weights' file; empty for weights that come from none.
      dtype: what encoder and decoder compute in.
    """

    def __init__(self, model: SAM2Base, name: str, checkpoint_sha256: str = "") -> None:
        self.model = model
        self.name = name
        self.checkpoint_sha256 = checkpoint_sha256
        self.device = model.device
        self.dtype = "bfloat16" if self.device.type == "cuda" else "float32"
        self.predictor = SAM2ImagePredictor(model)
        # The predictor assumes 1024 px; its features are at a quarter, an eighth and a sixteenth of the model's size.
        self.predictor._bb_feat_sizes = [(model.image_size // stride,) * 2 for stride in (4, 8, 16)]

    @classmethod
    def load(cls, model: str, device: str = "auto") -> "Segmenter":
        """Loads a model.

        Args:
          model: "toy" for the one inside this package, a directory with ``config.yaml`` and ``model.safetensors``,
            or a hub id such as "facebook/sam2.1-hiera-large".
          device: "cpu", "cuda", "cuda:1" or "auto": a GPU where there is one.

        Raises:
          ModelError: there is no such model or device, or the weights do not fit the configuration.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = _one_line(error)
            raise ModelError(f"device {device!r}: expected auto, cpu or a GPU that is here: {reason}") from None
        folder = TOY if model == "toy" else Path(model)
        if folder.is_dir():
            network, weights = _load_folder(folder), folder / "model.safetensors"
            network = network.to(device)
        elif model in HF_MODEL_ID_TO_FILENAMES:
            config, weights = HF_MODEL_ID_TO_FILENAMES[model][0], _download(model)
            network = build_sam2(config, str(weights), device=device)
        else:
            known = ", ".join(HF_MODEL_ID_TO_FILENAMES)
            raise ModelError(f"model {model!r}: expected toy, a directory with config.yaml, or one of {known}")
        return cls(network, model, hashlib.sha256(weights.read_bytes()).hexdigest())

    def embed(self, image: np.ndarray) -> Embedding:
        """Encodes one picture, uint8 RGB [height, width, 3]."""
        with torch.inference_mode(), self._precision():
            self.predictor.set_image(image)
            features = self.predictor._features
        levels = (*features["high_res_feats"], features["image_embed"])
        self.predictor.reset_predictor()
        return Embedding(levels, *image.shape[:2])

    def segment(self, embedding: Embedding, candidates: Sequence[Sequence[Prompt]]) -> Masks:
        """Masks of all candidates on one image; a candidate without objects has an empty mask."""
        shape = (len(candidates), embedding.height, embedding.width)
        unions = torch.zeros(shape, dtype=torch.bool, device=self.device)
        scores = np.zeros(len(candidates))
        by_points: dict[int, list[tuple[int, Prompt]]] = defaultdict(list)
        for owner, prompts in enumerate(candidates):
            for prompt in prompts:
                by_points[len(prompt.points)].append((owner, prompt))
        with torch.inference_mode():
            for group in by_points.values():
                for start in range(0, len(group), _PROMPTS_PER_CALL):
                    part = group[start : start + _PROMPTS_PER_CALL]
                    masks, best_scores = self._best_masks(embedding, [prompt for _, prompt in part])
                    for (owner, _), mask, score in zip(part, masks, best_scores, strict=True):
                        unions[owner] |= mask
                        scores[owner] += score / len(candidates[owner])
        return Masks(unions, tuple(scores.tolist()))

    def _best_masks(self, embedding: Embedding, prompts: Sequence[Prompt]) -> tuple[torch.Tensor, np.ndarray]:
        """Masks, bool [n, height, width], and scores [n] of prompts that all have the same number of points."""
        size = (embedding.height, embedding.width)
        corners = [[prompt.box[:2], prompt.box[2:], *prompt.points] for prompt in prompts]
        coords = torch.tensor(corners, dtype=torch.float32, device=self.device)
        coords = self.predictor._transforms.transform_coords(coords, normalize=True, orig_hw=size)
        # SAM's labels: 2 and 3 are a box's corners, 1 is a foreground point.
        labels = torch.tensor([2, 3] + [1] * (coords.shape[1] - 2), dtype=torch.int32, device=self.device)
        with self._precision():
            sparse, dense = self.model.sam_prompt_encoder(
                points=(coords, labels.expand(len(prompts), -1)), boxes=None, masks=None
            )
            logits, scores, _, _ = self.model.sam_mask_decoder(
                image_embeddings=embedding.levels[-1],
                image_pe=self.model.sam_prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=True,
                repeat_image=len(prompts) > 1,
                high_res_features=list(embedding.levels[:-1]),
            )
        # On the host, because on a GPU torch's argmax does not promise the first of equal scores, as numpy's does.
        found = scores.float().cpu().numpy()
        best = found.argmax(1)
        rows = np.arange(len(prompts))
        kept = logits[rows, best][:, None]
        masks = self.predictor._transforms.postprocess_masks(kept, size)[:, 0] > self.predictor.mask_threshold
        return masks, found[rows, best]

    def _precision(self) -> AbstractContextManager[object]:
        return torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()


def _load_folder(folder: Path) -> SAM2Base:
    config, weights = folder / "config.yaml", folder / "model.safetensors"
    for path in (config, weights):
        if not path.is_file():
            raise ModelError(f"model {str(folder)!r}: has no {path.name}, expected config.yaml and model.safetensors")
    try:
        network = build_model(OmegaConf.load(config))
    except (YAMLError, OmegaConfBaseException, HydraException) as error:
        raise ModelError(f"{config}: not the configuration of a SAM 2: {_one_line(error)}") from None
    try:
        network.load_state_dict({name: value.float() for name, value in load_file(weights).items()})
    except (SafetensorError, RuntimeError) as error:
        raise ModelError(f"{weights}: no weights for {config.name}: {_one_line(error)}") from None
    return network


def _download(model: str) -> Path:
    try:
        return Path(hf_hub_download(repo_id=model, filename=HF_MODEL_ID_TO_FILENAMES[model][1]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(f"model {model!r}: neither cached here nor had from the hub: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
