"""SAM 2 behind one small interface: images become embeddings, prompts become the highest-scored masks.

This is the only module that uses the ``sam2`` package (and its private names). Masks are those of
``SAM2ImagePredictor.predict(..., multimask_output=True)``, keeping the highest-scored of the three. Three things are
batched or saved: several images go through the encoder together, all prompts of an image with the same number of points
go through the mask decoder together, and only the kept mask is resized to the image.

Prompts with different numbers of points are not padded to one length: SAM 2's padding points take part in the
decoder's attention, so masks would change.
"""

import hashlib
import json
import pickle
from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import sam2
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from safetensors.torch import load_file
from sam2.build_sam import HF_MODEL_ID_TO_FILENAMES
from sam2.modeling.sam2_base import SAM2Base
from sam2.sam2_image_predictor import SAM2ImagePredictor
from torchvision.transforms import functional as pictures
from yaml import YAMLError

TOY = Path(__file__).parent / "assets" / "toy_sam2"
# Bounds the decoder's memory: hiera-large needs about 30 MB a prompt in bfloat16.
PROMPTS_PER_CALL = 128


class ModelError(ValueError):
    """A model that cannot be loaded; the message is one line."""


@dataclass(frozen=True)
class Prompt:
    """One object: a box (x1, y1, x2, y2) and foreground points (x, y), in pixels of the image."""

    box: tuple[float, float, float, float]
    points: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Embedding:
    """An encoded image: SAM 2's features, finest first, and the image's height and width."""

    levels: tuple[torch.Tensor, ...]
    height: int
    width: int

    @property
    def nbytes(self) -> int:
        return sum(level.nbytes for level in self.levels)

    def to(self, device: torch.device) -> "Embedding":
        """The embedding on another device; itself if it is already there."""
        return replace(self, levels=tuple(level.to(device) for level in self.levels))


@dataclass(frozen=True)
class Decoded:
    """Decoder outputs for the prompts of one image, before resizing to the image.

    Attributes:
      logits: logits of the highest-scored mask, [prompts, 1, size, size], on the model's device.
      scores: SAM 2's own estimate of that mask's IoU, float32 [prompts], on the host.
    """

    logits: torch.Tensor
    scores: np.ndarray


def build_model(config: DictConfig | ListConfig) -> SAM2Base:
    """Builds the network that a SAM 2 configuration describes, with new weights."""
    return instantiate(config.model, _recursive_=True).eval()


def published_config(name: str) -> Path:
    """The configuration inside the sam2 package, such as "configs/sam2.1/sam2.1_hiera_l.yaml"."""
    return Path(sam2.__file__).parent / name


class Segmenter:
    """A loaded SAM 2. Not thread-safe: one thread owns it.

    Attributes:
      name: the model name as requested.
      checkpoint_sha256: hexadecimal, over the weights' file and its configuration, unless sam2 or this package
        publishes that configuration; empty for weights that come from no file.
      dtype: the dtype in which encoder and decoder compute.
      compiled: whether the encoder is compiled; batches are then padded to powers of two, as each size is compiled.
    """

    def __init__(self, model: SAM2Base, name: str, checkpoint_sha256: str = "", compiled: bool = False) -> None:
        self.model = model
        self.name = name
        self.checkpoint_sha256 = checkpoint_sha256
        self.compiled = compiled
        self.device = model.device
        self.dtype = "bfloat16" if self.device.type == "cuda" else "float32"
        self.predictor = SAM2ImagePredictor(model)
        # The predictor assumes 1024 px; its features are at a quarter, an eighth and a sixteenth of the model's size.
        self.predictor._bb_feat_sizes = [(model.image_size // stride,) * 2 for stride in (4, 8, 16)]
        if compiled:
            model.image_encoder.forward = torch.compile(model.image_encoder.forward, dynamic=False)

    @classmethod
    def load(cls, model: str, device: str = "auto", config: str = "", compiled: bool = False) -> "Segmenter":
        """Loads a model.

        Args:
          model: "toy" for the one inside this package, a directory with ``config.yaml`` and ``model.safetensors``,
            a checkpoint file (.pt as published, or .safetensors), or a hub id such as "facebook/sam2.1-hiera-large".
          device: "cpu", "cuda", "cuda:1" or "auto" (a GPU if there is one).
          config: a checkpoint file's configuration: a YAML file, or the name of one inside the sam2 package. Published
            file names are known and need none.
          compiled: compile the image encoder.

        Raises:
          ModelError: there is no such model or device, or the weights do not fit the configuration.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, ImportError) as error:
            reason = one_line(error)
            raise ModelError(f"device {device!r}: expected auto, cpu or a GPU that is here: {reason}") from None
        settings, weights = _files(model, config)
        network = _network(settings, weights)
        try:
            network = network.to(device)
        except RuntimeError as error:
            raise ModelError(f"device {device!r}: cannot take model {model!r}: {one_line(error)}") from None
        return cls(network, model, _checksum(settings, weights), compiled)

    def check_alive(self) -> None:
        """Raises RuntimeError when the device no longer computes: after some errors a GPU refuses all further work."""
        torch.zeros(1, device=self.device).item()

    def embed(self, images: Sequence[np.ndarray]) -> list[Embedding]:
        """Encodes images together, each uint8 RGB [height, width, 3]; their sizes may differ."""
        with torch.inference_mode():
            pixels = torch.stack([self._prepared(image) for image in images])
            with self._precision():
                levels = self._encode(pixels)
        # Copies: a view would keep the whole batch in memory, and its layout would depend on the batch.
        alone = torch.contiguous_format
        return [
            Embedding(tuple(level[i : i + 1].clone(memory_format=alone) for level in levels), *image.shape[:2])
            for i, image in enumerate(images)
        ]

    def decode(
        self, embedding: Embedding, prompts: Sequence[Prompt], prompts_per_call: int = PROMPTS_PER_CALL
    ) -> Decoded:
        """The best mask for each prompt, in order; prompts with the same number of points share a decoder call."""
        by_points: dict[int, list[int]] = defaultdict(list)
        for place, prompt in enumerate(prompts):
            by_points[len(prompt.points)].append(place)
        parts = [
            group[start : start + prompts_per_call]
            for group in by_points.values()
            for start in range(0, len(group), prompts_per_call)
        ]
        side = self.model.image_size // 4
        logits = torch.empty(len(prompts), 1, side, side, device=self.device)
        scores = np.empty(len(prompts), np.float32)
        with torch.inference_mode():
            for places in parts:
                logits[places], scores[places] = self._best_logits(embedding, [prompts[place] for place in places])
        return Decoded(logits, scores)

    def masks(self, logits: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Masks at image size, bool [n, height, width], from logits [n, 1, size, size]."""
        with torch.inference_mode():
            whole = self.predictor._transforms.postprocess_masks(logits, (height, width))
            return whole[:, 0] > self.predictor.mask_threshold

    def _prepared(self, image: np.ndarray) -> torch.Tensor:
        """The predictor's own transform, on the model's device."""
        transforms = self.predictor._transforms
        pixels = torch.from_numpy(image).to(self.device).permute(2, 0, 1).contiguous().float().div(255)
        resized = pictures.resize(pixels, [transforms.resolution, transforms.resolution])
        return pictures.normalize(resized, transforms.mean, transforms.std)

    def _encode(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Features [n, channels, side, side], finest first, as in ``SAM2ImagePredictor.set_image_batch``."""
        count = len(pixels)
        if self.compiled:
            missing = (1 << (count - 1).bit_length()) - count
            pixels = torch.cat([pixels, pixels[:1].expand(missing, -1, -1, -1)])
        _, levels, _, _ = self.model._prepare_backbone_features(self.model.forward_image(pixels))
        if self.model.directly_add_no_mem_embed:
            levels[-1] = levels[-1] + self.model.no_mem_embed
        return [
            level.permute(1, 2, 0)[:count].unflatten(2, side)
            for level, side in zip(levels, self.predictor._bb_feat_sizes, strict=True)
        ]

    def _best_logits(self, embedding: Embedding, prompts: Sequence[Prompt]) -> tuple[torch.Tensor, np.ndarray]:
        """Logits [n, 1, size, size] and scores [n] of prompts that all have the same number of points."""
        corners = [[prompt.box[:2], prompt.box[2:], *prompt.points] for prompt in prompts]
        coords = torch.tensor(corners, dtype=torch.float32, device=self.device)
        size = (embedding.height, embedding.width)
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
        # Ties, which are common in bfloat16, go to the last: Seg-Zero's evaluation takes argsort(scores)[::-1][0]. On
        # the host, because torch's argmax on a GPU, unlike numpy's, does not guarantee the first of equal values.
        found = scores.float().cpu().numpy()
        best = found.shape[1] - 1 - found[:, ::-1].argmax(1)
        rows = np.arange(len(prompts))
        return logits[rows, best][:, None].float(), found[rows, best]

    def _precision(self) -> AbstractContextManager[object]:
        return torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()


def _files(model: str, config: str) -> tuple[Path, Path]:
    """Paths of a model's configuration and weights; hub models are downloaded. Raises ModelError."""
    folder = TOY if model == "toy" else Path(model)
    if config and not folder.is_file():
        raise ModelError(f"config {config!r}: only a checkpoint file needs one, model {model!r} is none")
    if folder.is_dir():
        settings, weights = folder / "config.yaml", folder / "model.safetensors"
        for path in (settings, weights):
            if not path.is_file():
                raise ModelError(f"model {model!r}: has no {path.name}, expected config.yaml and model.safetensors")
        return settings, weights
    if folder.is_file():
        names = {checkpoint: name for name, checkpoint in HF_MODEL_ID_TO_FILENAMES.values()}
        name = config or names.get(folder.name, "")
        for settings in (Path(name), published_config(name)):
            if name and settings.is_file():
                return settings, folder
        given = f"config {config!r}: no such file" if config else f"model {model!r}: give its --config"
        raise ModelError(f"{given}, expected a YAML file or a name such as {next(iter(names.values()))}")
    if model in HF_MODEL_ID_TO_FILENAMES:
        return published_config(HF_MODEL_ID_TO_FILENAMES[model][0]), _download(model)
    known = ", ".join(HF_MODEL_ID_TO_FILENAMES)
    raise ModelError(
        f"model {model!r}: expected toy, a directory with config.yaml, a checkpoint file, or one of {known}"
    )


def _network(config: Path, weights: Path) -> SAM2Base:
    try:
        network = build_model(OmegaConf.load(config))
    except (YAMLError, OmegaConfBaseException, HydraException, UnicodeDecodeError, AttributeError) as error:
        raise ModelError(f"{config}: not the configuration of a SAM 2: {one_line(error)}") from None
    try:
        if weights.suffix == ".safetensors":
            values = load_file(weights)
        else:
            values = torch.load(weights, map_location="cpu", weights_only=True)["model"]
        network.load_state_dict({name: value.float() for name, value in values.items()})
    except (pickle.UnpicklingError, EOFError):
        # PyTorch's own message advises loading the file without checking it.
        size = weights.stat().st_size
        raise ModelError(f"{weights}: {size} bytes, not a PyTorch checkpoint of tensors alone") from None
    except (KeyError, IndexError):
        raise ModelError(
            f"{weights}: has no entry 'model', under which a published checkpoint has its weights"
        ) from None
    except (SafetensorError, RuntimeError, TypeError, AttributeError) as error:
        raise ModelError(f"{weights}: no weights for {config.name}: {one_line(error)}") from None
    return network


def _checksum(config: Path, weights: Path) -> str:
    """The SHA-256 over everything that determines the scores: the same weights at another image size score differently.

    A configuration published with sam2 or this package is left out, since the weights alone identify it.
    """
    with weights.open("rb") as file:
        of_weights = hashlib.file_digest(file, "sha256").hexdigest()
    if any(config.resolve().is_relative_to(folder.resolve()) for folder in (TOY, published_config(""))):
        return of_weights
    settings = json.dumps(OmegaConf.to_container(OmegaConf.load(config).model, resolve=True), sort_keys=True)
    return hashlib.sha256(f"{of_weights} {settings}".encode()).hexdigest()


def _download(model: str) -> Path:
    try:
        return Path(hf_hub_download(repo_id=model, filename=HF_MODEL_ID_TO_FILENAMES[model][1]))
    except (HTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"model {model!r}: not cached here, and cannot be downloaded from the hub: {one_line(error)}"
        ) from None


def one_line(error: Exception) -> str:
    """An error's message on one line."""
    return " ".join(str(error).split())[:300]
