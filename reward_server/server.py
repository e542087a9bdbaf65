"""The life of a server: listen, load, warm up, serve, drain, stop."""

import errno
import logging
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import SERVICE_NAME as HEALTH_NAME
from grpc_reflection.v1alpha import reflection

from reward_server import reward_pb2, reward_pb2_grpc
from reward_server.access import Access, TokenCheck, bracketed
from reward_server.batcher import Batcher
from reward_server.engine import Engine, Job, Outcome
from reward_server.health import HealthServicer
from reward_server.segmenter import ModelError, Segmenter, one_line
from reward_server.service import RewardService
from reward_server.telemetry import Metrics, expose
from reward_server.worker import Workers

_SERVICE = reward_pb2.DESCRIPTOR.services_by_name["RewardService"]
SERVICE_NAME = _SERVICE.full_name
_METHODS = {method.name for method in _SERVICE.methods}
# A call holds a thread while it waits and while its request is being received. So there is a thread for each call that
# may wait or compute, and some for refusals and slow requests. Health has its own threads.
_SPARE_THREADS = 32
_MESSAGE_BYTES = 32 * 2**20
# Time for a batch that still runs after all calls have ended.
_LAST_BATCH_S = 10.0
_OPTIONS = [
    ("grpc.max_receive_message_length", _MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MESSAGE_BYTES),
    # Without this a second server on the same port would silently share its calls.
    ("grpc.so_reuseport", 0),
    # Clients ping idle connections every minute; by default the server would close them with "too_many_pings".
    ("grpc.http2.min_ping_interval_without_data_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Detects clients that vanished without closing the connection; their calls are dropped from the queue.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # Per connection; further calls wait on the client's side, not in our memory.
    ("grpc.max_concurrent_streams", 1024),
]

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """How a server listens and batches.

    Attributes:
      port, metrics_port: 0 picks a free port; without a metrics port there is no metrics page.
      max_batch: maximum number of requests sent to a device together, and of images encoded together.
      max_delay_s: how long the first request of an incomplete batch waits for others.
      max_queue: maximum number of requests that wait for a device or are prepared for it; further ones are refused.
      max_batch_s: if a batch answers no request for this long, its device hangs and the server reports itself dead.
      cache_bytes: size of the embedding cache per device.
      drain_s: how long calls in flight may take to finish once the server stops.
      reflection: serve the proto by gRPC reflection.
    """

    host: str = "127.0.0.1"
    port: int = 0
    access: Access = field(default_factory=Access)
    max_batch: int = 8
    max_delay_s: float = 0.005
    max_queue: int = 256
    max_batch_s: float = 300.0
    cache_bytes: int = 256 * 2**20
    drain_s: float = 10.0
    reflection: bool = False
    metrics_port: int | None = None


class RewardServer:
    """A gRPC server that listens from the start and serves once it has a model.

    Health: the service "" is SERVING from the start until a worker dies or the server stops; ``SERVICE_NAME`` is
    SERVING only while a warm model serves.

    Attributes:
      address: host and port that it listens on.
      metrics_address: host and port of the metrics page; empty without one.
      serves: whether it has a warm model; until then calls are refused.
      dead: whether a worker has died; it will not serve again.

    Raises:
      AccessError: on construction, if it may not listen there, or a certificate is invalid.
      OSError: on construction, if it cannot listen there.
    """

    def __init__(self, settings: Settings | None = None, devices: int = 1) -> None:
        self._settings = settings = settings or Settings()
        self.metrics = Metrics()
        self._batcher: Batcher[Job, Outcome] = Batcher(settings.max_batch, settings.max_delay_s, settings.max_queue)
        self._service = RewardService(self._batcher, self.metrics)
        self._health = HealthServicer()
        self._workers: Workers | None = None
        self.serves = self.dead = False
        self._host = bracketed(settings.host)
        settings.access.check_address(settings.host)
        credentials = settings.access.credentials()
        threads = settings.max_queue + devices * settings.max_batch + _SPARE_THREADS
        token = settings.access.token
        self._server = grpc.server(
            ThreadPoolExecutor(threads, thread_name_prefix="call"),
            interceptors=[TokenCheck(token, self._note_refused)] if token else [],
            options=_OPTIONS,
        )
        reward_pb2_grpc.add_RewardServiceServicer_to_server(self._service, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if settings.reflection:
            names = (SERVICE_NAME, HEALTH_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._server)
        self._health.set("", _SERVING)
        self._health.set(SERVICE_NAME, _NOT_SERVING)
        self.metrics.watch(
            "queue_depth",
            "Calls that wait for a device, or for their picture to be decoded",
            lambda: len(self._batcher),
        )
        self.address = f"{self._host}:{self._listen(credentials)}"
        self.metrics_address, self._stop_metrics = "", _nothing
        if settings.metrics_port is not None:
            try:
                port, self._stop_metrics = expose(
                    self.metrics, settings.host, settings.metrics_port, settings.access.tls, settings.access.client_ca
                )
            except OSError as error:
                where = f"{self._host}:{settings.metrics_port}"
                raise OSError(f"cannot listen on {where} for metrics: {error.strerror or error}") from None
            self.metrics_address = f"{self._host}:{port}"
        self._server.start()

    def serve(self, segmenters: Sequence[Segmenter]) -> None:
        """Warms up a loaded model on each of its devices and reports ready.

        Raises:
          ModelError: devices differ in dtype or weights, so that scores would depend on the device; or the model
            cannot be run.
        """
        _check_alike(segmenters)
        engines = [Engine(segmenter, self._settings.cache_bytes, self.metrics) for segmenter in segmenters]
        self.metrics.watch(
            "cache_bytes", "Bytes of embeddings kept", lambda: sum(engine.embeddings.nbytes for engine in engines)
        )
        self.metrics.watch_memory([segmenter.device for segmenter in segmenters])
        self._workers = Workers(engines, self._batcher, self.metrics, self._die, self._settings.max_batch_s)
        try:
            self._workers.start()
        except RuntimeError as error:  # No memory, or no compiler.
            raise ModelError(f"model {segmenters[0].name!r}: cannot be run: {one_line(error)}") from None
        self.serves = True
        self._service.ready(self._workers)
        self._health.set(SERVICE_NAME, _SERVING)
        first = segmenters[0]
        where = ", ".join(str(segmenter.device) for segmenter in segmenters)
        _log.info("serving %s on %s (%s, %s)", first.name, self.address, where, first.dtype)

    def stop(self) -> None:
        """Reports NOT_SERVING, refuses new calls, gives those in flight ``drain_s`` to finish, and ends."""
        self._health.enter_graceful_shutdown()
        self._server.stop(self._settings.drain_s).wait()
        if self._workers is not None:
            self._workers.stop(_LAST_BATCH_S)
        self._stop_metrics()
        _log.info("stopped")

    def _listen(self, credentials: grpc.ServerCredentials | None) -> int:
        host, port = self._settings.host, self._settings.port
        address = f"{self._host}:{port}"
        # gRPC is satisfied with one of a name's several addresses; callers of the others would reach another server.
        if port and (taken := _taken(_problems(host, port))):
            raise OSError(f"cannot listen on {address}: {taken}")
        try:
            if credentials is None:
                return self._server.add_insecure_port(address)
            return self._server.add_secure_port(address, credentials)
        except RuntimeError:
            reason = _cannot_bind(_problems(host, port))
            raise OSError(f"cannot listen on {address}: {reason}") from None

    def _note_refused(self, method: str, peer: str) -> None:
        name = method.rpartition("/")[2]
        # Callers can send any name, and Prometheus keeps every label.
        name = name if name in _METHODS else "other"
        self.metrics.requests.labels(name, grpc.StatusCode.UNAUTHENTICATED.name).inc()
        fields = {"method": name, "code": grpc.StatusCode.UNAUTHENTICATED.name, "peer": peer}
        _log.warning("%s from %s refused: UNAUTHENTICATED", name, peer, extra={"fields": fields})

    def _die(self) -> None:
        self.dead = True
        for name in ("", SERVICE_NAME):
            self._health.set(name, _NOT_SERVING)


def _check_alike(segmenters: Sequence[Segmenter]) -> None:
    """Raises ModelError unless all segmenters give the same scores, as those of one server must."""
    if len({segmenter.dtype for segmenter in segmenters}) > 1:
        found = ", ".join(f"{segmenter.device} computes in {segmenter.dtype}" for segmenter in segmenters)
        raise ModelError(f"devices: {found}; expected one dtype: give --device GPUs alone, or cpu")
    if len({segmenter.checkpoint_sha256 for segmenter in segmenters}) > 1:
        found = ", ".join(f"{segmenter.device} {segmenter.checkpoint_sha256[:12]}" for segmenter in segmenters)
        raise ModelError(f"model {segmenters[0].name!r}: its file changed while it was loaded: {found}; start again")


def _cannot_bind(problems: Sequence[OSError]) -> str:
    """The reason that the address cannot be bound, which gRPC does not report; an address in use takes precedence."""
    reason = problems[0].strerror or str(problems[0]) if problems else "gRPC's log line above says why"
    return _taken(problems) or reason


def _taken(problems: Sequence[OSError]) -> str:
    """A message that one of the host's addresses is in use; empty if none is."""
    taken = next((error for error in problems if error.errno == errno.EADDRINUSE), None)
    return f"{taken.strerror}; port 0 picks a free one" if taken else ""


def _problems(host: str, port: int) -> list[OSError]:
    """The errors of binding each of the host's addresses."""
    problems: list[OSError] = []
    try:
        addresses = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
        if host == "localhost":  # gRPC binds both IPv4 and IPv6, however the machine resolves that name.
            addresses += socket.getaddrinfo("::1", port, type=socket.SOCK_STREAM)
    except OSError as error:
        return [error]
    for family, kind, protocol, _, address in addresses:
        try:
            with socket.socket(family, kind, protocol) as one:
                # Closed connections in TIME_WAIT do not count.
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                one.bind(address)
        except OSError as error:
            problems.append(error)
    return problems


def _nothing() -> None:
    """Does nothing."""
