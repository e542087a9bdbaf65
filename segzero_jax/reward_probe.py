"""The state of one reward server, asked over a connection of its own, with an immediate answer."""

from collections.abc import Mapping

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from reward_server import reward_pb2, reward_pb2_grpc
from segzero_jax.reward_channel import (
    SERVICE,
    Access,
    RewardServerError,
    RewardServiceAway,
    explained,
    misconfigured,
    no_answer,
    open_probe,
)
from segzero_jax.reward_messages import ServerInfo, info_from

_SERVING = health_pb2.HealthCheckResponse.SERVING
_INFO = reward_pb2.GetInfoRequest()
_HEALTH = health_pb2.HealthCheckRequest(service=SERVICE)


def probe(address: str, access: Access, timeout_s: float, loaded: bool = True) -> ServerInfo:
    """Asks one server for its info.

    Raises:
      RewardServiceAway: it is unreachable or, with ``loaded``, does not serve yet.
      RewardServerError: it has another version, or its certificate or token does not match.
    """
    with open_probe(address, access) as channel:
        try:
            # The version first: a server of another version may not have a service of this name.
            response = reward_pb2_grpc.RewardServiceStub(channel).GetInfo(_INFO, timeout=timeout_s)
            info = _checked_info(address, response)
            if loaded:
                status = health_pb2_grpc.HealthStub(channel).Check(_HEALTH, timeout=timeout_s).status
        except grpc.RpcError as error:
            problem = explained(address, error, no_answer(timeout_s, "look at its log"), access)
            raise (RewardServerError(str(problem)) if misconfigured(error) else problem) from None
    if loaded and status != _SERVING:
        raise RewardServiceAway(f"reward server {address}: not serving, its model may be loading: look at its log")
    return info


def check_same_model(infos: Mapping[str, ServerInfo]) -> None:
    """Raises RewardServerError if models differ: their scores must not meet in group-relative advantages."""
    models: dict[tuple[str, str], str] = {}
    for address, info in infos.items():
        models.setdefault((info.checkpoint_sha256, info.dtype), f"{info.model} in {info.dtype} at {address}")
    if len(models) > 1:
        raise RewardServerError(f"reward servers differ: {', '.join(models.values())}: expected one model")


def check_version(address: str, version: int) -> None:
    """Raises RewardServerError if the server at ``address`` does not speak this client's version."""
    if version != reward_pb2.API_VERSION_CURRENT:
        raise RewardServerError(
            f"reward server {address}: speaks API version {version}, this client speaks "
            f"{reward_pb2.API_VERSION_CURRENT}: run the same release on both sides"
        )


def _checked_info(address: str, response: reward_pb2.GetInfoResponse) -> ServerInfo:
    check_version(address, response.api_version)
    return info_from(address, response)
