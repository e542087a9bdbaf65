"""Many clients at once, each answer checked: python -m benchmarks.soak_reward_server [--seconds 60] [--clients 64]

The server runs in its own process. Every client is a thread with its own connection that sends one request after
another: groups of several sizes, with image bytes or hash only, for scores and masks, with invalid candidates between
valid ones. The expected answers are computed beforehand with the plain SAM2ImagePredictor, box by box. The server's
memory is read every second from /proc. Exits with 1 if an answer was wrong or lost, or memory grew by over 5%.
"""

import argparse
import json
import statistics
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import torch

from benchmarks.peer_group import machine
from benchmarks.reward_requests import group_request, picture, prompts
from benchmarks.server_process import server_process
from reward_server import reward_pb2, reward_pb2_grpc
from reward_server.codec import decode_mask
from reward_server.segmenter import Segmenter

# Batching changes the order of float32 sums, so a pixel whose logit is nearly zero may change sides.
PIXELS_APART = 5
# Allowed growth from the second quarter of the time to the last: caches and allocators, but no leak.
MEMORY_GROWTH = 0.05
OUTSIDE = reward_pb2.Candidate(objects=[reward_pb2.ObjectPrompt(box=reward_pb2.Box(x1=-9, y1=-9, x2=-5, y2=-5))])


@dataclass
class Tally:
    """Results of all clients."""

    calls: int = 0
    unavailable_hashes: int = 0
    wrong: list[str] = field(default_factory=list)
    answered: set[str] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def record(self, request_id: str, problem: str) -> None:
        with self.lock:
            self.calls += 1
            if request_id in self.answered:
                problem = problem or "answered twice"
            self.answered.add(request_id)
            if problem:
                self.wrong.append(f"{request_id}: {problem}")


def right_masks(segmenter: Segmenter, index: int, size: int) -> list[np.ndarray]:
    """The plain predictor's masks of a group, one prompt after another."""
    predictor = segmenter.predictor
    predictor.set_image(picture(index).image)
    masks = []
    for prompt in prompts(index, size):
        found, scores, _ = predictor.predict(
            point_coords=np.array(prompt.points), point_labels=np.ones(1), box=np.array(prompt.box)
        )
        masks.append(found[np.argsort(scores)[::-1][0]] > 0)
    return masks


def problem_of(
    response: reward_pb2.ScoreResponse | reward_pb2.SegmentResponse, index: int, masks: list[np.ndarray], bad: int
) -> str:
    """The problem with an answer, empty if it is correct; candidate number ``bad`` must be refused."""
    if len(response.candidates) != len(masks) + 1:
        return f"{len(response.candidates)} candidates, expected {len(masks) + 1}"
    entries = list(response.candidates)
    if entries.pop(bad).status.code != 11:
        return f"candidate {bad} was not refused"
    target = picture(index).objects[0].mask
    for number, (entry, mask) in enumerate(zip(entries, masks, strict=True)):
        if entry.status.code != 0:
            return f"candidate {number}: {entry.status.message}"
        if entry.HasField("mask") and (decode_mask(entry.mask, *mask.shape) != mask).sum() > PIXELS_APART:
            return f"candidate {number}: another mask"
        if isinstance(entry, reward_pb2.CandidateScore):
            expected = ((mask & target).sum(), (mask | target).sum())
            if max(abs(entry.intersection - expected[0]), abs(entry.union - expected[1])) > PIXELS_APART:
                return f"candidate {number}: {entry.intersection} of {entry.union} pixels, expected {expected}"
    return ""


def client(
    number: int, address: str, until: float, right: dict[tuple[int, int], list[np.ndarray]], tally: Tally
) -> None:
    draws = np.random.default_rng(number)
    kinds = sorted(right)
    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(address, options=options) as channel:
        stub = reward_pb2_grpc.RewardServiceStub(channel)
        call = 0
        while time.monotonic() < until:
            index, size = kinds[draws.integers(len(kinds))]
            request = reward_pb2.ScoreRequest()
            request.CopyFrom(group_request(index, size))
            request.request_id = f"client {number} call {call}"
            call += 1
            bad = int(draws.integers(size + 1))
            candidates = list(request.candidates)
            del request.candidates[:]
            request.candidates.extend([*candidates[:bad], OUTSIDE, *candidates[bad:]])
            by_hash, wants_masks, segments = draws.random(3) < (0.3, 0.2, 0.2)
            request.return_masks = bool(wants_masks)
            data = request.image.data
            if by_hash:
                request.image.ClearField("data")
            try:
                try:
                    response = ask(stub, request, bool(segments))
                except grpc.RpcError as error:
                    if not by_hash or error.code() is not grpc.StatusCode.FAILED_PRECONDITION:
                        raise
                    request.image.data = data
                    with tally.lock:
                        tally.unavailable_hashes += 1
                    response = ask(stub, request, bool(segments))
            except grpc.RpcError as error:
                tally.record(request.request_id, f"{error.code().name}: {error.details()}")
                continue
            crossed = response.request_id != request.request_id
            problem = f"answered as {response.request_id}" if crossed else ""
            tally.record(request.request_id, problem or problem_of(response, index, right[index, size], bad))


def ask(
    stub: reward_pb2_grpc.RewardServiceStub, request: reward_pb2.ScoreRequest, segments: bool
) -> reward_pb2.ScoreResponse | reward_pb2.SegmentResponse:
    if not segments:
        return stub.Score(request, timeout=120)
    only = reward_pb2.SegmentRequest(
        request_id=request.request_id, image=request.image, frame=request.frame, candidates=request.candidates
    )
    return stub.Segment(only, timeout=120)


def resident_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def soak(seconds: float, clients: int, pictures: int = 40) -> dict[str, Any]:
    """Runs the test; returns the results that the command prints, without asserting anything."""
    torch.set_num_threads(1)
    segmenter = Segmenter.load("toy", "cpu")
    right = {(index, size): right_masks(segmenter, index, size) for index in range(pictures) for size in (1, 4, 8)}
    # A cache too small for all images, so that embeddings are evicted all the time.
    flags = ["--model", "toy", "--threads", "1", "--cache-mib", "8"]
    with server_process(flags) as server:
        tally, start = Tally(), time.monotonic()
        until = start + seconds
        threads = [
            threading.Thread(target=client, args=(number, server.address, until, right, tally))
            for number in range(clients)
        ]
        for thread in threads:
            thread.start()
        memory = []
        while time.monotonic() < until:
            time.sleep(min(1.0, seconds / 10))
            memory.append(resident_mib(server.pid))
        for thread in threads:
            thread.join()
        elapsed = time.monotonic() - start
        served = sum(server.metric(f'requests_total{{code="OK",method="{name}"}}') for name in ("Score", "Segment"))
        batches = server.metric("batch_size_sum") / server.metric("batch_size_count")
    quarter = max(1, len(memory) // 4)
    return {
        "clients": clients,
        "seconds": round(elapsed, 1),
        "calls": tally.calls,
        "served": int(served),
        "sent_again_with_bytes": tally.unavailable_hashes,
        "wrong": tally.wrong,
        "mean_batch": round(batches, 2),
        "memory_mib_second_quarter": round(statistics.median(memory[quarter : 2 * quarter] or memory), 1),
        "memory_mib_last_quarter": round(statistics.median(memory[-quarter:]), 1),
        "memory_mib_each_second": [round(value, 1) for value in memory],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60, help="[%(default)s]")
    parser.add_argument("--clients", type=int, default=64, help="[%(default)s]")
    parser.add_argument("--output", type=Path, help="write the figures there as JSON")
    options = parser.parse_args()
    found = soak(options.seconds, options.clients)
    wrong = found["wrong"]
    print(f"{found['clients']} clients, {found['seconds']} s: {found['calls']} calls, {found['served']} served")
    print(f"{len(wrong)} lost, doubled, crossed or wrong; {found['mean_batch']} calls a batch")
    print(
        f"memory {found['memory_mib_second_quarter']} MiB in the second quarter, "
        f"{found['memory_mib_last_quarter']} MiB in the last"
    )
    for line in wrong[:10]:
        print(f"  {line}")
    if options.output:
        options.output.write_text(json.dumps({**found, **machine("torch", "grpcio")}, indent=1) + "\n")
    grew = found["memory_mib_last_quarter"] / found["memory_mib_second_quarter"] - 1
    if grew > MEMORY_GROWTH:
        print(f"memory grew by {grew:.0%}, expected {MEMORY_GROWTH:.0%} at most")
    return 1 if wrong or found["calls"] != found["served"] or grew > MEMORY_GROWTH else 0


if __name__ == "__main__":
    sys.exit(main())
