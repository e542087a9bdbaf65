"""The life of a server: listen, load, warm up, serve, stop."""

import json
import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from reward_server import reward_pb2, reward_pb2_grpc
from reward_server.segmenter import Segmenter
from reward_server.service import RewardService
from reward_server.worker import Worker

SERVICE_NAME = reward_pb2.DESCRIPTOR.services_by_name["RewardService"].full_name
# A call holds a thread from start to end, most of the time waiting for the worker.
_HANDLERS = 64
_MESSAGE_BYTES = 32 * 2**20
_GRACE_S = 10.0
_OPTIONS = [
    ("grpc.max_receive_message_length", _MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MESSAGE_BYTES),
    # Without this a second server on the same port would silently share its calls.
    ("grpc.so_reuseport", 0),
    # Clients ping idle connections every minute; a server that minds closes them with "too_many_pings".
    ("grpc.http2.min_ping_interval_without_data_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
]

_log = logging.getLogger(__name__)


class RewardServer:
    """A gRPC server that listens from the start and serves once a model is loaded.

    Attributes:
      address: host and port that it listens on.

    Raises:
      OSError: on construction, when it cannot listen there.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self._server = grpc.server(ThreadPoolExecutor(_HANDLERS, thread_name_prefix="call"), options=_OPTIONS)
        self._service = RewardService()
        self._health = health.HealthServicer()
        self._worker: Worker | None = None
        reward_pb2_grpc.add_RewardServiceServicer_to_server(self._service, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        try:
            bound = self._server.add_insecure_port(f"{host}:{port}")
        except RuntimeError:
            raise OSError(
                f"cannot listen on {host}:{port}: is another process there? port 0 picks a free one"
            ) from None
        self.address = f"{host}:{bound}"
        self._server.start()

    def load(self, model: str, device: str) -> None:
        """Loads a model, warms it up and reports SERVING. Raises ``segmenter.ModelError``."""
        worker = Worker(Segmenter.load(model, device))
        worker.warm_up()
        self._worker = worker
        self._service.ready(worker)
        self._set_health(health_pb2.HealthCheckResponse.SERVING)
        segmenter = worker.segmenter
        _log.info("serving %s on %s (%s, %s)", segmenter.name, self.address, segmenter.device, segmenter.dtype)

    def stop(self) -> None:
        """Reports NOT_SERVING, lets calls in flight finish for a while, and ends."""
        self._health.enter_graceful_shutdown()
        self._server.stop(_GRACE_S).wait()
        if self._worker is not None:
            self._worker.stop()
        _log.info("stopped")

    def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for name in ("", SERVICE_NAME):
            self._health.set(name, status)


def serve(host: str, port: int, model: str, device: str) -> None:
    """Serves until a signal raises out of it; announces the address as one line of JSON on standard output.

    Raises:
      OSError: it cannot listen there.
      segmenter.ModelError: there is no such model.
    """
    server = RewardServer(host, port)
    try:
        print(json.dumps({"listening": server.address}), flush=True)
        server.load(model, device)
        threading.Event().wait()
    finally:
        server.stop()
