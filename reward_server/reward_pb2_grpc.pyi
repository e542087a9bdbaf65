"""Types for reward_pb2_grpc.py, which protoc writes without any. One line a call: keep it beside reward.proto."""

import grpc

from reward_server import reward_pb2

class RewardServiceStub:
    Score: grpc.UnaryUnaryMultiCallable
    Segment: grpc.UnaryUnaryMultiCallable
    GetInfo: grpc.UnaryUnaryMultiCallable
    def __init__(self, channel: grpc.Channel) -> None: ...

class RewardServiceServicer:
    def Score(self, request: reward_pb2.ScoreRequest, context: grpc.ServicerContext) -> reward_pb2.ScoreResponse: ...
    def Segment(
        self, request: reward_pb2.SegmentRequest, context: grpc.ServicerContext
    ) -> reward_pb2.SegmentResponse: ...
    def GetInfo(
        self, request: reward_pb2.GetInfoRequest, context: grpc.ServicerContext
    ) -> reward_pb2.GetInfoResponse: ...

def add_RewardServiceServicer_to_server(servicer: RewardServiceServicer, server: grpc.Server) -> None: ...
