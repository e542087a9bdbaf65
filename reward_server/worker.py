"""The one thread that owns the model, and the embeddings it remembers."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from reward_server.segmenter import Embedding, Prompt, Segmenter


@dataclass(frozen=True)
class Job:
    """One image and its candidates.

    Attributes:
      key: SHA-256 of the encoded picture.
      image: uint8 RGB [height, width, 3], or None where ``embedding`` is given.
      embedding: what an earlier request left for the same picture.
      candidates: each a sequence of prompts in pixels of the image.
      target: candidates' masks are compared with this bool mask [height, width]; or with the mask of these prompts;
        or with nothing.
      want_masks: return masks too.
      wanted: asked when the job's turn comes; a job that nobody waits for any more is dropped.
    """

    key: bytes
    image: np.ndarray | None
    embedding: Embedding | None
    candidates: Sequence[Sequence[Prompt]]
    target: np.ndarray | Sequence[Prompt] | None
    want_masks: bool
    wanted: Callable[[], bool]


@dataclass(frozen=True)
class Outcome:
    """What a job gave, one entry per candidate: pixel counts, SAM 2's own score and, where asked, the mask."""

    intersections: list[int]
    unions: list[int]
    target_area: int
    scores: Sequence[float]
    masks: np.ndarray | None


class Embeddings:
    """Embeddings by picture, the least recently used forgotten first. Thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._entries: OrderedDict[bytes, Embedding] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: bytes) -> Embedding | None:
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
            return self._entries.get(key)

    def put(self, key: bytes, embedding: Embedding) -> None:
        with self._lock:
            if key in self._entries or embedding.nbytes > self._max_bytes:
                return
            self._entries[key] = embedding
            self._bytes += embedding.nbytes
            while self._bytes > self._max_bytes:
                _, forgotten = self._entries.popitem(last=False)
                self._bytes -= forgotten.nbytes


class Worker:
    """Runs jobs one after another on its own thread, which alone touches the segmenter."""

    def __init__(self, segmenter: Segmenter, cache_bytes: int = 256 * 2**20) -> None:
        self.segmenter = segmenter
        self.embeddings = Embeddings(cache_bytes)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="segmenter")

    def warm_up(self) -> None:
        """Runs the model twice, because PyTorch specialises its image transform on the first calls."""
        box = Prompt((8.0, 8.0, 40.0, 40.0), ((20.0, 20.0),))
        for _ in range(2):
            blank = np.zeros((48, 64, 3), np.uint8)
            self.run(Job(b"", blank, None, [[box, box]], [box], False, lambda: True))

    def run(self, job: Job) -> Outcome | None:
        """Runs a job when its turn comes and waits for it; None when nobody wanted it any more by then."""
        return self._thread.submit(self._run, job).result()

    def stop(self) -> None:
        """Finishes what is queued, then ends the thread."""
        self._thread.shutdown()

    def _run(self, job: Job) -> Outcome | None:
        if not job.wanted():
            return None
        embedding = job.embedding or self.embeddings.get(job.key)
        if embedding is None:
            assert job.image is not None
            embedding = self.segmenter.embed(job.image)
            self.embeddings.put(job.key, embedding)
        if isinstance(job.target, np.ndarray) or job.target is None:
            found = self.segmenter.segment(embedding, job.candidates)
            masks = found.masks
            target = (
                torch.zeros_like(masks[:1]) if job.target is None else torch.from_numpy(job.target).to(masks.device)
            )
        else:
            found = self.segmenter.segment(embedding, [*job.candidates, job.target])
            masks, target = found.masks[:-1], found.masks[-1]
        return Outcome(
            intersections=(masks & target).sum((1, 2)).tolist(),
            unions=(masks | target).sum((1, 2)).tolist(),
            target_area=int(target.sum()),
            scores=found.scores[: len(job.candidates)],
            masks=masks.cpu().numpy() if job.want_masks else None,
        )
