"""What travels between trainer and server, as the trainer's own types."""

from sam_calls import encoded, prompts_of, scene, serving

from reward_server import reward_pb2
from reward_server.codec import encode_mask
from reward_server.validation import MAX_ID_CHARACTERS
from segzero_jax.reward_client import RewardClient
from segzero_jax.reward_messages import ScoreRequest, score_from, score_request, segment_request
from segzero_jax.types import Frame, ObjectPrompt, RleMask


def test_a_prompt_outside_the_picture_is_a_score_of_zero_and_none_is_missing() -> None:
    outside = reward_pb2.CandidateScore(status=reward_pb2.Status(code=11, message="outside"), union=40)
    score = score_from(outside, 40)
    assert (score.iou, score.intersection, score.union, score.error) == (0.0, 0, 40, "outside")
    for code in (3, 13):
        score = score_from(reward_pb2.CandidateScore(status=reward_pb2.Status(code=code, message="no box")), 40)
        assert (score.iou, score.intersection, score.union, score.error) == (None, 0, 40, "no box")


def asked(id: str) -> ScoreRequest:
    """The first toy scene's first object, answered as its target is."""
    picture = scene()
    height, width = picture.image.shape[:2]
    prompt = prompts_of(picture)[0]
    answer = (ObjectPrompt(prompt.box, prompt.points),)
    target = RleMask(height, width, encode_mask(picture.objects[0].mask).counts)
    return ScoreRequest(id, encoded(picture.image), Frame(width, height), target, (answer,))


def test_an_id_is_as_long_as_a_server_takes_and_still_another_for_another_question() -> None:
    ends = [asked("é" * 400 + end) for end in ("a", "b")]
    for message in (
        lambda one: score_request(one, False).request_id,
        lambda one: segment_request(one.id, one.image, one.frame, one.candidates).request_id,
    ):
        first, second = map(message, ends)
        assert max(len(first), len(second)) <= MAX_ID_CHARACTERS
        assert first != second
        assert first.startswith("é" * 200)
        assert message(asked("x" * MAX_ID_CHARACTERS)) == "x" * MAX_ID_CHARACTERS


def test_a_question_with_a_long_id_is_scored_as_any_other() -> None:
    short, long = asked("a question"), asked("a caption that is taken for an id " * 20)
    with serving() as (server, _), RewardClient(server.address, 60) as client:
        (expected,), (found,) = client.score([short, long]).result()
        (mask,) = client.segment(long.image, long.frame, long.candidates, id=long.id)
    assert found == expected
    assert found.iou is not None
    assert found.iou > 0.5
    assert mask.error == ""
    assert mask.mask is not None
