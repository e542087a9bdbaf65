"""The reward server beside the plain predictor and the bare model: python -m benchmarks.reward_server [--output FILE]

A group is one image and 8 candidates with a box and a point each. Five ways to answer groups take turns, so that other
load on the machine affects all of them:

  plain loop   SAM2ImagePredictor: set_image and predict for every candidate
  predictor    SAM2ImagePredictor: set_image once, predict for every candidate
  network      encoder and decoder alone, on prepared tensors, batched like the server; no masks at image size
  model        the same, plus the work for a mask: the image's transform, and the best mask at image size
  server       calls to ``python -m reward_server`` in its own process: transport, PNG decoding, hashing, counting

Beside groups per second it reports the CPU time per group of the process that computes, which other programs on the
machine hardly affect.

The server caches no embeddings here, so every group is encoded, and its queue is never empty while it is measured.
Without a GPU the model is the toy one on one thread; with a GPU it is hiera-large with random weights, which are as
fast as trained ones. ``--network tiny`` is hiera-tiny with random weights, also on a CPU. If an answer of the server
differs from the plain predictor's, no figures are reported.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks.peer_group import Unequal, at_least, machine, need

need("reward", "torch", "sam2", "omegaconf")

import grpc  # noqa: E402  (after what says how to get them)
import numpy as np  # noqa: E402
import torch  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402

from benchmarks.reward_requests import PICTURES, group_request, picture, prompts  # noqa: E402
from benchmarks.server_process import Server, server_process  # noqa: E402
from reward_server import reward_pb2  # noqa: E402
from reward_server.segmenter import Segmenter, build_model, published_config  # noqa: E402

# Published names, by size: the configuration inside the sam2 package and the checkpoint file.
PUBLISHED = {
    "tiny": ("configs/sam2.1/sam2.1_hiera_t.yaml", "sam2.1_hiera_tiny.pt"),
    "large": ("configs/sam2.1/sam2.1_hiera_l.yaml", "sam2.1_hiera_large.pt"),
}
GROUP = 8
# Number of images whose answers are compared with the predictor's.
COMPARED = 8
# Tolerances for rounding, since the server encodes images together and the predictor one by one: logits closer to zero
# than this share of the mask's root mean square may have either sign, and of masks whose scores are this close either
# may be the best. With random weights, bfloat16 logits differ from float32 ones by up to 5% of the root mean square.
OPEN = {"float32": (1e-3, 1e-5), "bfloat16": (0.1, 0.01)}


class Right(NamedTuple):
    """A mask the predictor may give: its certain pixels, and its certain or undecided pixels, bool [height, width]."""

    surely: np.ndarray
    perhaps: np.ndarray

    def has(self, counted: reward_pb2.CandidateScore, target: np.ndarray) -> bool:
        """Whether the counts can be those of such a mask and the target."""
        least, most = (self.surely & target).sum(), (self.perhaps & target).sum()
        if not least <= counted.intersection <= most:
            return False
        return bool((self.surely | target).sum() <= counted.union <= (self.perhaps | target).sum())


def plain_loop(segmenter: Segmenter, groups: int, once: bool) -> None:
    """Computes the best mask of every candidate; sets the image for each candidate, or ``once`` per group."""
    predictor = segmenter.predictor
    with torch.inference_mode(), segmenter._precision():
        for index in range(groups):
            for number, prompt in enumerate(prompts(index, GROUP)):
                if number == 0 or not once:
                    predictor.set_image(picture(index).image)
                masks, scores, _ = predictor.predict(
                    point_coords=np.array(prompt.points), point_labels=np.ones(1), box=np.array(prompt.box)
                )
                _ = masks[np.argsort(scores)[::-1][0]] > 0
    predictor.reset_predictor()


def right_masks(segmenter: Segmenter, groups: int) -> list[list[list[Right]]]:
    """The correct masks by group and candidate; more than one if their scores are equal within rounding."""
    predictor, found = segmenter.predictor, []
    share, close = OPEN[segmenter.dtype]
    with torch.inference_mode(), segmenter._precision():
        for index in range(groups):
            predictor.set_image(picture(index).image)
            found.append([])
            for prompt in prompts(index, GROUP):
                logits, scores, _ = predictor.predict(
                    point_coords=np.array(prompt.points),
                    point_labels=np.ones(1),
                    box=np.array(prompt.box),
                    return_logits=True,
                )
                logits, scores = np.asarray(logits, np.float32), np.asarray(scores, np.float32)
                near = share * np.sqrt((logits**2).mean((1, 2), keepdims=True))
                best = scores >= scores.max() - close
                found[-1].append(
                    [Right(*pair) for pair in zip(logits[best] > near[best], logits[best] > -near[best], strict=True)]
                )
    predictor.reset_predictor()
    return found


def network(segmenter: Segmenter, groups: int, batch: int) -> None:
    """Runs encoder and decoder; the first call, which is not timed, prepares images and prompts."""
    for start in range(0, groups, batch):
        count = min(batch, groups - start)
        with torch.inference_mode(), segmenter._precision():
            levels = segmenter._encode(_prepared(segmenter, count))
            for i in range(count):
                sparse, dense = segmenter.model.sam_prompt_encoder(points=_points(segmenter), boxes=None, masks=None)
                segmenter.model.sam_mask_decoder(
                    image_embeddings=levels[-1][i : i + 1],
                    image_pe=segmenter.model.sam_prompt_encoder.get_dense_pe(),
                    sparse_prompt_embeddings=sparse,
                    dense_prompt_embeddings=dense,
                    multimask_output=True,
                    repeat_image=True,
                    high_res_features=[level[i : i + 1] for level in levels[:-1]],
                )
    if segmenter.device.type == "cuda":
        torch.cuda.synchronize()


_kept: dict[int, torch.Tensor] = {}


def _prepared(segmenter: Segmenter, count: int) -> torch.Tensor:
    if count not in _kept:
        _kept[count] = torch.stack([segmenter._prepared(picture(index).image) for index in range(count)])
    return _kept[count]


def _points(segmenter: Segmenter) -> tuple[torch.Tensor, torch.Tensor]:
    size = segmenter.model.image_size
    coords = torch.tensor([[[0.2, 0.2], [0.7, 0.7], [0.5, 0.5]]], device=segmenter.device).repeat(GROUP, 1, 1) * size
    labels = torch.tensor([[2, 3, 1]], dtype=torch.int32, device=segmenter.device).repeat(GROUP, 1)
    return coords, labels


def model(segmenter: Segmenter, groups: int, batch: int) -> None:
    for start in range(0, groups, batch):
        indices = range(start, min(start + batch, groups))
        images = [picture(index).image for index in indices]
        for index, image, embedding in zip(indices, images, segmenter.embed(images), strict=True):
            decoded = segmenter.decode(embedding, prompts(index, GROUP))
            segmenter.masks(decoded.logits, *image.shape[:2]).sum((1, 2)).tolist()


class Stream:
    """Calls to the server, ``outstanding`` of them in flight at any time, whose answers are checked.

    Args:
      right: the result of ``right_masks`` for the first images.
    """

    def __init__(self, server: Server, outstanding: int, right: list[list[list[Right]]]) -> None:
        self._server, self._outstanding, self._right = server, outstanding, right
        self._waiting: deque[grpc.Future] = deque()
        self._sent = 0

    def fill(self) -> None:
        while len(self._waiting) < self._outstanding:
            call = self._server.stub.Score.future(group_request(self._sent, GROUP), timeout=3600)
            self._waiting.append(call)
            self._sent += 1

    def answered(self, groups: int) -> None:
        """Waits for ``groups`` answers; sends a new call after each."""
        for _ in range(groups):
            self._check(self._waiting.popleft().result())
            self.fill()

    def drain(self) -> None:
        while self._waiting:
            self._check(self._waiting.popleft().result())

    def _check(self, response: reward_pb2.ScoreResponse) -> None:
        index = int(response.request_id)
        if len(response.candidates) != GROUP or any(entry.status.code for entry in response.candidates):
            raise Unequal(f"picture {index}: a candidate was not scored")
        if index >= len(self._right):
            return
        target = picture(index).objects[0].mask
        for number, (entry, masks) in enumerate(zip(response.candidates, self._right[index], strict=True)):
            if not any(mask.has(entry, target) for mask in masks):
                counted = (f"{(m.surely & target).sum()} of {(m.surely | target).sum()}" for m in masks)
                raise Unequal(
                    f"picture {index}, candidate {number}: {entry.intersection} of {entry.union} pixels, "
                    f"the predictor {' or '.join(counted)} and those that are open"
                )


def random_checkpoint(folder: Path, network: str) -> str:
    """Writes a network with random weights in the format of the published checkpoints."""
    config, name = PUBLISHED[network]
    torch.manual_seed(0)
    path = folder / name
    torch.save({"model": build_model(OmegaConf.load(published_config(config))).state_dict()}, path)
    return str(path)


def timed(work: Callable[[int], object], groups: int, pid: int) -> tuple[float, float]:
    """Groups per second, and CPU milliseconds per group of the process that computes."""
    start, used = time.perf_counter(), _processor_seconds(pid)
    work(groups)
    return groups / (time.perf_counter() - start), 1000 * (_processor_seconds(pid) - used) / groups


def _processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(options: argparse.Namespace, source: str) -> dict[str, object]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    threads = ["--threads", "1"] if device == "cpu" else []
    if threads:
        torch.set_num_threads(1)
    segmenter = Segmenter.load(source, device, compiled=options.compile)
    batch = options.batch
    flags = ["--model", source, "--device", device, "--max-batch", str(batch), "--cache-mib", "0", *threads]
    if options.compile:
        flags.append("--compile")
    for index in range(PICTURES):  # Made before the timing starts.
        group_request(index, GROUP)
    right = right_masks(segmenter, COMPARED)
    with server_process(flags) as server:
        # One batch on the device and one that waits.
        stream = Stream(server, 2 * batch, right)
        few = max(1, options.groups // 4)
        ways: dict[str, tuple[Callable[[int], object], int, int]] = {
            "plain loop": (lambda n: plain_loop(segmenter, n, once=False), few, os.getpid()),
            "predictor": (lambda n: plain_loop(segmenter, n, once=True), few, os.getpid()),
            "network": (lambda n: network(segmenter, n, batch), options.groups, os.getpid()),
            "model": (lambda n: model(segmenter, n, batch), options.groups, os.getpid()),
            "server": (stream.answered, options.groups, server.pid),
        }
        for name, (work, _, _) in ways.items():
            if name == "server":
                stream.fill()
            work(1 if name == "plain loop" else batch)
        stream.drain()
        encoded, calls = server.metric("images_encoded_total"), server.metric("call_seconds_count")
        batches = server.metric("batch_size_count")
        rates: dict[str, list[float]] = {name: [] for name in ways}
        costs: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(1, options.rounds + 1):
            print(f"round {number} of {options.rounds}", file=sys.stderr)
            for name, (work, groups, pid) in ways.items():
                if name == "server":
                    # Untimed first batch, after which the queue is full.
                    stream.fill()
                    stream.answered(batch)
                rate, cost = timed(work, groups, pid)
                stream.drain()
                rates[name].append(rate)
                costs[name].append(cost)
        calls = server.metric("call_seconds_count") - calls
        encoded = server.metric("images_encoded_total") - encoded
        batches = server.metric("batch_size_count") - batches
    middle = {name: statistics.median(values) for name, values in rates.items()}
    name = (
        torch.cuda.get_device_name() if device == "cuda" else f"{platform.processor() or platform.machine()}, 1 thread"
    )
    return {
        "model": "toy" if source == "toy" else f"hiera-{options.network}, random weights",
        "device": name,
        "group": GROUP,
        "max_batch": batch,
        "groups_per_second": {name: round(value, 2) for name, value in middle.items()},
        "processor_ms_per_group": {name: round(statistics.median(values), 1) for name, values in costs.items()},
        "all_rounds": {name: [round(v, 2) for v in values] for name, values in rates.items()},
        # Ratios of neighbouring rounds, so that temporary load on the machine does not favour one side.
        "server_to_network": round(_ratio(rates["server"], rates["network"]), 3),
        "server_to_model": round(_ratio(rates["server"], rates["model"]), 3),
        "server_to_predictor": round(_ratio(rates["server"], rates["predictor"]), 2),
        "server_to_plain_loop": round(_ratio(rates["server"], rates["plain loop"]), 2),
        "encodings_per_group": encoded / calls,
        "mean_batch": round(calls / batches, 2),
    }


def _ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--groups", type=at_least(1), default=64, help="groups a round [%(default)s]")
    parser.add_argument("--rounds", type=at_least(1), default=9, help="[%(default)s]")
    parser.add_argument("--batch", type=at_least(1), default=8, help="--max-batch of the server [%(default)s]")
    parser.add_argument("--compile", action="store_true", help="--compile for the server, and for the model beside it")
    parser.add_argument("--output", type=Path, help="write the figures there as JSON")
    usual = "large" if torch.cuda.is_available() else "toy"
    parser.add_argument("--network", choices=["toy", *PUBLISHED], default=usual, help="[%(default)s here]")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = "toy" if options.network == "toy" else random_checkpoint(Path(folder), options.network)
        try:
            found = measure(options, source)
        except Unequal as error:
            sys.exit(f"the server's answers differ, no figures: {error}")
    if found["encodings_per_group"] != 1:
        sys.exit(f"{found['encodings_per_group']:g} encodings a group, expected one for its picture")
    rates, costs = found["groups_per_second"], found["processor_ms_per_group"]
    assert isinstance(rates, dict)
    assert isinstance(costs, dict)
    print(f"{found['model']} on {found['device']}; groups of {GROUP}, batches of {options.batch}")
    for name, value in rates.items():
        print(f"  {name:<12} {value:8.2f} groups/s {costs[name]:8.1f} ms of processor time a group")
    print(
        f"server: {found['server_to_network']:.1%} of the network, {found['server_to_model']:.1%} of the model, "
        f"{found['server_to_predictor']} times the predictor, {found['server_to_plain_loop']} times the plain loop; "
        f"{found['encodings_per_group']:g} encodings a group, "
        f"{found['mean_batch']} calls a batch"
    )
    if options.output:
        options.output.write_text(json.dumps({**found, **machine("torch", "grpcio")}, indent=1) + "\n")


if __name__ == "__main__":
    main()
