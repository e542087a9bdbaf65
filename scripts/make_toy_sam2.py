"""Makes the toy SAM 2 of the embedded run: ``python scripts/make_toy_sam2.py`` (10 minutes on one CPU core).

A small SAM 2.1 of the real architecture (Hiera of width 16, 256 px, 1.3 million parameters) is trained on toy scenes to
turn a box, a box with one or two points, or a point alone into a mask. The same seed, threads and library versions give
the same weights.

SAM 2 is a general segmenter, so it may be trained on content that the policy's splits hold out: scenes are drawn from
the training and the crowded distribution, with seeds that no split uses.

Writes ``config.yaml`` and ``model.safetensors`` (float16) and prints the mask IoU on scenes it has not seen.
"""

import argparse
import time
from collections.abc import Callable, Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file
from sam2.modeling.sam2_base import SAM2Base
from torch.nn import functional

from reward_server.segmenter import Segmenter, build_model
from segzero_jax.data.scenes import Scene, sample_scene

IMAGES, PROMPTS = 4, 8
LOSS_SIZE = 64
LOG_EVERY = 50
LEARNING_RATE = 1e-3
# Random streams; the splits of segzero_jax.data use others.
TRAIN_STREAM, HELDOUT_STREAM = 7001, 7002
# If no side is off by more than this share of the object, the target is the whole object; else the box cuts it.
HEALED = 0.15
POINT_COUNTS = ((True, 1), (True, 1), (True, 2), (True, 0), (False, 1))


class Prompt(NamedTuple):
    """A prompt in pixels of the scene, and its target mask, bool [H, W]."""

    box: np.ndarray
    points: np.ndarray
    target: np.ndarray


class Batch(NamedTuple):
    """Images [b, 3, S, S]; prompts of one form as SAM's points [b*k, n, 2], labels [b*k, n]; targets [b*k, L, L]."""

    images: torch.Tensor
    coords: torch.Tensor
    labels: torch.Tensor
    targets: torch.Tensor


class Predictions(NamedTuple):
    """Three mask logits [n, 3, L, L] and predicted IoUs [n, 3] per prompt."""

    logits: torch.Tensor
    scores: torch.Tensor


def shrunken_config(width: int = 16, model_width: int = 64, image_size: int = 256) -> DictConfig:
    """SAM 2.1 tiny's own configuration with its widths and depths reduced."""
    text = resources.files("sam2").joinpath("configs/sam2.1/sam2.1_hiera_t.yaml").read_text()
    config = OmegaConf.create(text)
    model = config.model
    model.image_size = image_size
    trunk = model.image_encoder.trunk
    trunk.embed_dim, trunk.stages, trunk.global_att_blocks = width, [1, 1, 2, 1], [3]
    neck = model.image_encoder.neck
    neck.d_model = neck.position_encoding.num_pos_feats = model_width
    neck.backbone_channel_list = [8 * width, 4 * width, 2 * width, width]
    # The memory modules serve video only; they are kept, at a small size, because the architecture has them.
    memory = model.memory_attention
    memory.d_model = memory.layer.d_model = memory.layer.dim_feedforward = model_width
    memory.num_layers = 1
    for attention in (memory.layer.self_attention, memory.layer.cross_attention):
        attention.embedding_dim, attention.feat_sizes = model_width, [image_size // 16] * 2
    encoder = model.memory_encoder
    memory.layer.cross_attention.kv_in_dim = encoder.out_dim = encoder.position_encoding.num_pos_feats = width
    encoder.in_dim = encoder.mask_downsampler.embed_dim = encoder.fuser.layer.dim = model_width
    encoder.fuser.num_layers = 1
    return config


def jittered_box(box: tuple[int, ...], rng: np.random.Generator, spread: float) -> np.ndarray:
    """Moves each side by a normal share of the object's size; a box stays at least four pixels wide and high."""
    x1, y1, x2, y2 = box
    moved = np.array(box) + rng.normal(0, spread, 4) * np.array([x2 - x1, y2 - y1] * 2)
    low, high = np.minimum(moved[:2], moved[2:] - 4), np.maximum(moved[2:], moved[:2] + 4)
    return np.concatenate([low, high])


def cut(mask: np.ndarray, box: np.ndarray) -> np.ndarray:
    """The part of a mask inside a box."""
    kept = np.zeros_like(mask)
    x1, y1, x2, y2 = (max(0, round(float(v))) for v in box)
    kept[y1 : y2 + 1, x1 : x2 + 1] = mask[y1 : y2 + 1, x1 : x2 + 1]
    return kept


def sample_prompt(scene: Scene, with_box: bool, points: int, rng: np.random.Generator) -> Prompt:
    """A prompt as a policy in training might write it: exact, a little off, far off, or random.

    A box that is a little off still means the whole object. A box that is far off cuts it, so a worse box gives a
    worse mask.
    """
    while True:
        item = scene.objects[rng.integers(len(scene.objects))]
        size = np.array([item.box[2] - item.box[0], item.box[3] - item.box[1]] * 2)
        spread = float(rng.choice([0.0, 0.05, 0.1, 0.3], p=[0.15, 0.35, 0.25, 0.25]))
        box = jittered_box(item.box, rng, spread)
        if rng.random() < 0.1:
            height, width = item.mask.shape
            corners = rng.uniform(0, [width, height], (2, 2))
            box = np.concatenate([corners.min(0), corners.max(0)])
            item = max(scene.objects, key=lambda candidate: cut(candidate.mask, box).sum())
        healed = np.abs(box - np.array(item.box)).max() <= (HEALED * size).max()
        target = item.mask if healed or not with_box else cut(item.mask, box)
        if target.sum() >= 30:
            break
    rows, columns = np.nonzero(target)
    chosen = rng.integers(len(rows), size=points)
    spots = np.stack([columns[chosen], rows[chosen]], 1).astype(np.float64)
    if with_box and rng.random() < 0.3:
        spots += rng.normal(0, 8, spots.shape)
    elif points and rng.random() < 0.5:
        spots[0] = item.point if target[item.point[1], item.point[0]] else spots[0]
    return Prompt(box, spots, target)


def training_batches(segmenter: Segmenter, seed: int) -> Iterator[Batch]:
    """Yields batches endlessly; all prompts of a batch have the same form, so that they can be stacked."""
    rng = np.random.default_rng([seed, TRAIN_STREAM])
    transforms, size = segmenter.predictor._transforms, segmenter.model.image_size
    while True:
        with_box, count = POINT_COUNTS[rng.integers(len(POINT_COUNTS))]
        images, coords, targets = [], [], []
        for _ in range(IMAGES):
            scene, _ = sample_scene("heldout_crowd" if rng.random() < 0.4 else "train", rng)
            height, width = scene.image.shape[:2]
            images.append(transforms(scene.image))
            for _ in range(PROMPTS):
                prompt = sample_prompt(scene, with_box, count, rng)
                corners = prompt.box.reshape(2, 2) if with_box else np.zeros((0, 2))
                coords.append(np.concatenate([corners, prompt.points]) * (size / width, size / height))
                targets.append(_resized(prompt.target))
        labels = torch.tensor(([2, 3] if with_box else []) + [1] * count).repeat(len(coords), 1)
        yield Batch(torch.stack(images), torch.tensor(np.stack(coords)).float(), labels, torch.stack(targets))


def _resized(mask: np.ndarray) -> torch.Tensor:
    """A mask at the loss's resolution; each pixel holds the share of it that the object covers."""
    full = torch.from_numpy(mask).float()[None, None]
    return functional.interpolate(full, (LOSS_SIZE, LOSS_SIZE), mode="bilinear", antialias=True)[0, 0]


def encode(segmenter: Segmenter, images: torch.Tensor) -> list[torch.Tensor]:
    """Computes ``SAM2ImagePredictor.set_image``, finest level first, for a batch and with gradients."""
    model = segmenter.model
    _, flat, _, _ = model._prepare_backbone_features(model.forward_image(images))
    flat[-1] = flat[-1] + model.no_mem_embed
    sizes = segmenter.predictor._bb_feat_sizes
    return [level.permute(1, 2, 0).unflatten(2, size) for level, size in zip(flat, sizes, strict=True)]


def focused(model: SAM2Base) -> None:
    """Initialises the decoder's attention so that it starts near the place a prompt points to.

    With the same projection for queries and keys, a token attends to the pixels that share its position encoding, and
    vice versa; a wide encoding lets a pixel tell which side of a corner it is on. With PyTorch's initialisation and
    heads of four channels, the model ignores prompts for a thousand steps.
    """
    model.sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix.mul_(0.5)
    for name, module in model.sam_mask_decoder.named_modules():
        if name.endswith(("cross_attn_token_to_image", "cross_attn_image_to_token", "final_attn_token_to_image")):
            with torch.no_grad():
                module.q_proj.weight.mul_(4)
                module.k_proj.weight.copy_(module.q_proj.weight)


def decode(model: SAM2Base, levels: list[torch.Tensor], coords: torch.Tensor, labels: torch.Tensor) -> Predictions:
    """Decodes prompts, each with its own features (finest first), to masks at the loss's resolution."""
    sparse, dense = model.sam_prompt_encoder(points=(coords, labels), boxes=None, masks=None)
    logits, scores, _, _ = model.sam_mask_decoder(
        image_embeddings=levels[-1],
        image_pe=model.sam_prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=True,
        repeat_image=False,
        high_res_features=levels[:-1],
    )
    size = (LOSS_SIZE, LOSS_SIZE)
    return Predictions(functional.interpolate(logits, size, mode="bilinear", align_corners=False), scores)


def loss(found: Predictions, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy and dice loss of all three masks, and a loss of the predicted scores against the true IoU.

    SAM trains only the best of three masks, because a click may mean a whole or its part. Toy objects have no parts, so
    all three are trained and a wrong choice among them does no harm.

    Returns the loss and, for the log, the mean IoU of the mask with the highest score.
    """
    logits, scores = found
    wanted = targets[:, None].expand_as(logits)
    cross_entropy = functional.binary_cross_entropy_with_logits(logits, wanted)
    chances = logits.sigmoid()
    dice = 1 - (2 * (chances * wanted).sum((2, 3)) + 1) / (chances.sum((2, 3)) + wanted.sum((2, 3)) + 1)
    with torch.no_grad():
        inside, true = logits > 0, wanted > 0.5
        iou = (inside & true).sum((2, 3)) / (inside | true).sum((2, 3)).clamp(min=1)
        chosen = iou.gather(1, scores.argmax(1, keepdim=True)).mean()
    return 5 * cross_entropy + dice.mean() + functional.mse_loss(scores, iou), chosen


def learn(
    name: str,
    parameters: Iterable[torch.nn.Parameter],
    steps: int,
    decay: bool,
    lesson: Callable[[], tuple[torch.Tensor, torch.Tensor]],
) -> None:
    """Runs AdamW on the loss that ``lesson`` returns (with an IoU for the log), with a short linear warm-up."""
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 20, 0.5 + 0.5 * np.cos(np.pi * step / steps) if decay else 1.0)
    )
    start, seen = time.monotonic(), []
    for step in range(1, steps + 1):
        value, iou = lesson()
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()
        schedule.step()
        seen.append((value.item(), iou.item()))
        if step % LOG_EVERY == 0:
            mean = np.mean(seen[-LOG_EVERY:], axis=0)
            print(f"{name} {step}, {time.monotonic() - start:.0f} s: loss {mean[0]:.3f}, IoU {mean[1]:.3f}", flush=True)


def train(segmenter: Segmenter, steps: int, seed: int) -> None:
    """Trains in two phases: the decoder alone to fill boxes, then the whole model to segment the objects in them."""
    model = segmenter.model.train()
    focused(model)
    decoder = [*model.sam_prompt_encoder.parameters(), *model.sam_mask_decoder.parameters()]
    rng = np.random.default_rng([seed, TRAIN_STREAM, 1])
    blank = [
        torch.zeros(IMAGES * PROMPTS, *level.shape[1:])
        for level in encode(segmenter, torch.zeros(1, 3, *[model.image_size] * 2))
    ]

    def where() -> tuple[torch.Tensor, torch.Tensor]:
        coords, labels, targets = box_lesson(IMAGES * PROMPTS, model.image_size, rng)
        return loss(decode(model, blank, coords, labels), targets)

    batches = training_batches(segmenter, seed)

    def what() -> tuple[torch.Tensor, torch.Tensor]:
        batch = next(batches)
        levels = [level.repeat_interleave(PROMPTS, 0) for level in encode(segmenter, batch.images)]
        return loss(decode(model, levels, batch.coords, batch.labels), batch.targets)

    learn("where", decoder, steps // 4, False, where)
    learn("what", model.parameters(), steps, True, what)
    model.eval()


def box_lesson(count: int, size: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Boxes, each with a point inside, their labels, and the filled boxes as targets; no image is involved."""
    middles, halves = rng.uniform(20, size - 20, (count, 2)), rng.uniform(12, 60, (count, 2))
    boxes = torch.tensor(np.stack([middles - halves, middles + halves], 1)).float()
    points = torch.tensor(middles + rng.uniform(-0.5, 0.5, (count, 2)) * halves).float()
    places = (torch.arange(LOSS_SIZE) + 0.5) * size / LOSS_SIZE
    within = (places >= boxes[:, :1].transpose(1, 2)) & (places <= boxes[:, 1:].transpose(1, 2))
    across, down = within[:, 0].float(), within[:, 1].float()
    coords = torch.cat([boxes, points[:, None]], 1)
    return coords, torch.tensor([2, 3, 1]).repeat(count, 1), down[:, :, None] * across[:, None]


def heldout_iou(
    segmenter: Segmenter, split: str, spread: float, with_box: bool, points: int, scenes: int = 60
) -> float:
    """Mean IoU between an object and the highest-scored mask for its (jittered) box and points.

    Uses ``SAM2ImagePredictor.predict`` as published. Every call with the same split uses the same objects.
    """
    rng = np.random.default_rng([0, HELDOUT_STREAM])
    ious = []
    for _ in range(scenes):
        scene, question = sample_scene(split, rng)
        item = scene.objects[question.answer]
        draws = np.random.default_rng([1, HELDOUT_STREAM, len(ious)])
        rows, columns = np.nonzero(item.mask)
        second = draws.integers(len(rows))
        spots = np.array([item.point, (columns[second], rows[second])], float)[:points]
        segmenter.predictor.set_image(scene.image)
        masks, scores, _ = segmenter.predictor.predict(
            point_coords=spots if points else None,
            point_labels=np.ones(points) if points else None,
            box=jittered_box(item.box, draws, spread) if with_box else None,
        )
        best = masks[scores.argmax()] > 0
        ious.append((best & item.mask).sum() / (best | item.mask).sum())
    return float(np.mean(ious))


def report(segmenter: Segmenter) -> None:
    """Prints the oracle ceiling per split and prompt form, and the mean IoU as boxes move away from the object."""
    for split in ("val", "heldout_pairs", "heldout_crowd"):
        forms = {"box": (True, 0), "box + point": (True, 1), "box + 2 points": (True, 2), "point": (False, 1)}
        ious = {name: heldout_iou(segmenter, split, 0.0, *form) for name, form in forms.items()}
        print(f"{split}: " + ", ".join(f"{name} {iou:.3f}" for name, iou in ious.items()), flush=True)
    for spread in (0.05, 0.1, 0.2, 0.3, 0.5, 1.0):
        iou = heldout_iou(segmenter, "val", spread, True, 1)
        print(f"val, box sides off by {spread:.0%} of the object (standard deviation) + point: {iou:.3f}", flush=True)


def save(segmenter: Segmenter, config: DictConfig, out: Path) -> None:
    """Writes the configuration and the weights as float16, each file atomically."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().half().contiguous() for name, value in segmenter.model.state_dict().items()}
    partial = out / "model.safetensors.partial"
    save_file(weights, partial)
    partial.replace(out / "model.safetensors")
    partial = out / "config.yaml.partial"
    OmegaConf.save(config, partial)
    partial.replace(out / "config.yaml")


def main() -> None:
    """Trains and saves the model, then loads it again and measures it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("reward_server/assets/toy_sam2"), help="[%(default)s]")
    parser.add_argument("--steps", type=int, default=1200, help="[%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="[%(default)s]")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads [%(default)s]")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    config = shrunken_config()
    segmenter = Segmenter(build_model(config), "new")
    train(segmenter, args.steps, args.seed)
    save(segmenter, config, args.out)
    report(Segmenter.load(str(args.out), device="cpu"))
    print(f"wrote {args.out / 'config.yaml'} and {args.out / 'model.safetensors'}")


if __name__ == "__main__":
    main()
