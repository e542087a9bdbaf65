"""The gRPC service: takes calls, has devices answer them, builds responses and refusals."""

import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import Any, NoReturn, TypeVar

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from reward_server import reward_pb2, reward_pb2_grpc
from reward_server.batcher import Batcher, ClosedError, NotServedError, Ticket, TooLateError
from reward_server.codec import encode_mask
from reward_server.engine import DeviceMemoryError, Job, Outcome
from reward_server.telemetry import Metrics
from reward_server.validation import MAX_ID_CHARACTERS, RequestError, job_from, limits, status
from reward_server.worker import Workers

# The memory may be held by another process, which will not free it within milliseconds.
_MEMORY_RETRY_S = 1.0
# gRPC ends a late call by its own clock; a call that ends this close to its deadline was late, not cancelled.
_CLOCKS_APART_S = 0.05
# Polling interval in which a call that waits to decode its image checks whether it was cancelled.
_LOOK_S = 0.2

Request = TypeVar("Request", reward_pb2.ScoreRequest, reward_pb2.SegmentRequest)
Response = TypeVar("Response", reward_pb2.ScoreResponse, reward_pb2.SegmentResponse)

_log = logging.getLogger(__name__)


@dataclass
class _Call:
    """Fields of a call's log line; ``request_id`` is cut to the length allowed in a request."""

    method: str
    request_id: str
    start: float
    candidates: int = 0
    image_bytes: int = 0
    batch: int = 0
    queue_s: float = 0.0
    compute_s: float = 0.0


class _Turns:
    """A fair semaphore: ``count`` holders at a time, in order of arrival; cancelled waiters leave the queue."""

    def __init__(self, count: int) -> None:
        self._free = count
        self._waiting: deque[threading.Event] = deque()
        self._lock = threading.Lock()

    @contextmanager
    def taken(self, wanted: Callable[[], bool]) -> Iterator[bool]:
        """Waits for a turn and holds it in the block; yields False, perhaps without a turn, if no longer ``wanted``."""
        mine = threading.Event()
        with self._lock:
            self._waiting.append(mine)
            self._go_on()
        while not mine.wait(_LOOK_S) and wanted():
            pass
        try:
            yield wanted()
        finally:
            with self._lock:
                if mine.is_set():
                    self._free += 1
                else:
                    self._waiting.remove(mine)
                self._go_on()

    def _go_on(self) -> None:
        while self._free and self._waiting:
            self._free -= 1
            self._waiting.popleft().set()


class RewardService(reward_pb2_grpc.RewardServiceServicer):
    """The three calls of reward.proto. Until ``ready`` is called, only GetInfo answers."""

    def __init__(self, batcher: Batcher[Job, Outcome], metrics: Metrics) -> None:
        self._batcher = batcher
        self._metrics = metrics
        self._workers: Workers | None = None
        self._checkpoint = self._dtype = ""
        # Otherwise a burst of calls would take the cores from the threads that run the models.
        self._turns = _Turns(max(1, len(os.sched_getaffinity(0)) - 1))

    def ready(self, workers: Workers) -> None:
        """Serves with these workers from now on."""
        segmenter = workers.engines[0].segmenter
        self._checkpoint, self._dtype = segmenter.checkpoint_sha256, segmenter.dtype
        self._workers = workers

    def Score(self, request: reward_pb2.ScoreRequest, context: grpc.ServicerContext) -> reward_pb2.ScoreResponse:
        return self._answer("Score", request, context, _score_response)

    def Segment(self, request: reward_pb2.SegmentRequest, context: grpc.ServicerContext) -> reward_pb2.SegmentResponse:
        return self._answer("Segment", request, context, _segment_response)

    def GetInfo(self, request: reward_pb2.GetInfoRequest, context: grpc.ServicerContext) -> reward_pb2.GetInfoResponse:
        info = reward_pb2.GetInfoResponse(
            api_version=reward_pb2.API_VERSION_CURRENT,
            server_version=_installed("segzero-jax"),
            limits=limits(),
            libraries={name: _installed(name) for name in ("torch", "sam2")},
        )
        if self._workers is not None:
            segmenters = [engine.segmenter for engine in self._workers.engines]
            info.model, info.checkpoint_sha256 = segmenters[0].name, self._checkpoint
            info.dtype, info.device = self._dtype, ",".join(str(s.device) for s in segmenters)
        self._metrics.requests.labels("GetInfo", grpc.StatusCode.OK.name).inc()
        return info

    def _answer(
        self,
        method: str,
        request: Request,
        context: grpc.ServicerContext,
        word: Callable[[str, list[reward_pb2.Status], Outcome], Response],
    ) -> Response:
        """Answers a call, or ends it with the status of its error; either way it is counted and logged."""
        name = request.request_id[:MAX_ID_CHARACTERS]
        call = _Call(method, name, time.monotonic(), len(request.candidates), len(request.image.data))
        try:
            statuses, outcome = self._run(request, context, call)
            response = word(request.request_id, statuses, outcome)
            response.checkpoint_sha256, response.dtype = self._checkpoint, self._dtype
        except NotServedError as error:
            codes = {TooLateError: grpc.StatusCode.DEADLINE_EXCEEDED, ClosedError: grpc.StatusCode.UNAVAILABLE}
            code = codes.get(type(error), grpc.StatusCode.RESOURCE_EXHAUSTED)
            self._refuse(call, context, code, str(error), getattr(error, "retry_after_s", 0.0))
        except DeviceMemoryError as error:
            self._refuse(call, context, grpc.StatusCode.RESOURCE_EXHAUSTED, str(error), _MEMORY_RETRY_S)
        except RequestError as error:
            self._refuse(call, context, error.code, error.reason)
        except Exception:  # A server error: the caller gets INTERNAL, the log has the details.
            _log.exception("request %r failed", call.request_id)
            self._refuse(call, context, grpc.StatusCode.INTERNAL, "the server failed: its log says how")
        for entry in response.candidates:
            self._metrics.candidates.labels(_NAMES[entry.status.code]).inc()
        self._record(call, grpc.StatusCode.OK, "")
        return response

    def _run(
        self, request: Request, context: grpc.ServicerContext, call: _Call
    ) -> tuple[list[reward_pb2.Status], Outcome]:
        """Runs a request on a device. Raises NotServedError, RequestError, DeviceMemoryError or the model's error."""
        if self._workers is None:
            raise RequestError(grpc.StatusCode.UNAVAILABLE, "the model is still loading")
        deadline = call.start + context.time_remaining()
        # A place is reserved before the image is decoded: an overloaded server should not spend its time on decoding,
        # and calls that wait for decoding would otherwise take all threads.
        with self._batcher.reserve(deadline):
            with self._turns.taken(context.is_active) as wanted:
                if not wanted:
                    raise _unwanted(deadline)
                job, statuses = job_from(request, self._workers.find)
            ticket = self._batcher.submit(job, deadline, reserved=True)
        self._wait(ticket, context)
        now = time.monotonic()
        if ticket.taken:
            call.batch, call.queue_s, call.compute_s = ticket.batch, ticket.taken - ticket.enqueued, now - ticket.taken
            self._metrics.queue_seconds.observe(call.queue_s)
            self._metrics.compute_seconds.observe(call.compute_s)
        if not ticket.future.done() or ticket.future.cancelled():
            raise _unwanted(deadline)
        outcome = ticket.future.result()
        for i, score in enumerate(outcome.scores):
            if not math.isfinite(score):
                statuses[i] = status(grpc.StatusCode.INTERNAL, f"SAM 2 gave the score {score}")
        return statuses, outcome

    @staticmethod
    def _wait(ticket: Ticket[Job, Outcome], context: grpc.ServicerContext) -> None:
        """Waits for the outcome or the end of the call; cancels the ticket of an ended call."""
        ended = threading.Event()
        ticket.future.add_done_callback(lambda _: ended.set())
        if not context.add_callback(ended.set):
            ended.set()
        ended.wait()
        ticket.future.cancel()

    def _refuse(
        self, call: _Call, context: grpc.ServicerContext, code: grpc.StatusCode, reason: str, retry_after_s: float = 0.0
    ) -> NoReturn:
        """Ends the call with a status and, if a retry may help, its delay: as gRPC pushback and as RetryInfo."""
        self._record(call, code, reason)
        if retry_after_s:
            delay = duration_pb2.Duration()
            delay.FromMilliseconds(round(retry_after_s * 1000))
            detail = any_pb2.Any()
            detail.Pack(error_details_pb2.RetryInfo(retry_delay=delay))
            rich = rpc_status.to_status(status_pb2.Status(code=code.value[0], message=reason, details=[detail]))
            pushback = ("grpc-retry-pushback-ms", str(delay.ToMilliseconds()))
            context.set_trailing_metadata((*rich.trailing_metadata, pushback))
        context.abort(code, reason)
        raise AssertionError("abort raises")

    def _record(self, call: _Call, code: grpc.StatusCode, reason: str) -> None:
        seconds = time.monotonic() - call.start
        self._metrics.requests.labels(call.method, code.name).inc()
        if code is grpc.StatusCode.OK:
            # Fast refusals would make an overloaded server look fast; late calls are counted in ``requests``.
            self._metrics.call_seconds.observe(seconds)
        fields: dict[str, Any] = {
            "method": call.method,
            "request_id": call.request_id,
            "code": code.name,
            "candidates": call.candidates,
            "image_bytes": call.image_bytes,
            "seconds": round(seconds, 4),
            "queue_seconds": round(call.queue_s, 4),
            "compute_seconds": round(call.compute_s, 4),
            "batch": call.batch,
        }
        level = logging.INFO if code is grpc.StatusCode.OK else logging.WARNING
        what = f"refused: {code.name}: {reason}" if reason else f"{call.candidates} candidates in {seconds:.3f} s"
        _log.log(level, "%s %r %s", call.method, call.request_id, what, extra={"fields": fields})


def _unwanted(deadline: float) -> Exception:
    """The error that ends a late or cancelled call."""
    if time.monotonic() >= deadline - _CLOCKS_APART_S:
        return TooLateError()
    return RequestError(grpc.StatusCode.CANCELLED, "nobody waited for the answer any more")


_NAMES = {code.value[0]: code.name for code in grpc.StatusCode}


def _score_response(request_id: str, statuses: list[reward_pb2.Status], outcome: Outcome) -> reward_pb2.ScoreResponse:
    response = reward_pb2.ScoreResponse(
        request_id=request_id, target_area=outcome.target_area, api_version=reward_pb2.API_VERSION_CURRENT
    )
    for i, candidate_status in enumerate(statuses):
        entry = response.candidates.add(status=candidate_status)
        if candidate_status.code == 0:
            entry.intersection, entry.union = outcome.intersections[i], outcome.unions[i]
            # An empty union scores 1 if there is no target, and 0 if there is one.
            entry.iou = entry.intersection / entry.union if entry.union else float(not outcome.has_target)
            entry.model_score = outcome.scores[i]
            if outcome.masks is not None:
                entry.mask.CopyFrom(encode_mask(outcome.mask(i)))
        elif candidate_status.code == grpc.StatusCode.OUT_OF_RANGE.value[0]:
            entry.union = outcome.target_area
    return response


def _segment_response(
    request_id: str, statuses: list[reward_pb2.Status], outcome: Outcome
) -> reward_pb2.SegmentResponse:
    response = reward_pb2.SegmentResponse(request_id=request_id)
    for i, candidate_status in enumerate(statuses):
        entry = response.candidates.add(status=candidate_status)
        if candidate_status.code == 0:
            entry.mask.CopyFrom(encode_mask(outcome.mask(i)))
            entry.model_score = outcome.scores[i]
    return response


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
