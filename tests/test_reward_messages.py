"""What travels between trainer and server, as the trainer's own types."""

from reward_server import reward_pb2
from segzero_jax.reward_messages import score_from


def test_a_prompt_outside_the_picture_is_a_score_of_zero_and_none_is_missing() -> None:
    outside = reward_pb2.CandidateScore(status=reward_pb2.Status(code=11, message="outside"), union=40)
    score = score_from(outside, 40)
    assert (score.iou, score.intersection, score.union, score.error) == (0.0, 0, 40, "outside")
    for code in (3, 13):
        score = score_from(reward_pb2.CandidateScore(status=reward_pb2.Status(code=code, message="no box")), 40)
        assert (score.iou, score.intersection, score.union, score.error) == (None, 0, 40, "no box")
