"""The event file, read with TensorBoard's own message definitions and another implementation of its checksum."""

import struct

import pytest
from tensorboardX.crc32c import crc32c
from tensorboardX.proto import event_pb2

from segzero_jax.tensorboard import EventFile


def masked(data):
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def events(path):
    data, found = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        header, record, footer = data[8:12], data[12 : 12 + length], data[12 + length : 16 + length]
        assert struct.unpack("<I", header) == (masked(data[:8]),)
        assert struct.unpack("<I", footer) == (masked(record),)
        found.append(event_pb2.Event.FromString(record))
        data = data[16 + length :]
    return found


def test_scalars_arrive_with_step_and_tag(tmp_path):
    file = EventFile(tmp_path)
    file.write(1, {"reward/mean": 2.5, "kl": -0.25})
    file.write(300, {"grösse": 1.0})
    (path,) = tmp_path.iterdir()
    version, first, second = events(path)  # already there before it is closed
    file.close()
    assert path.name.startswith("events.out.tfevents.")
    assert version.file_version == "brain.Event:2"
    assert first.step == 1
    assert [(value.tag, value.simple_value) for value in first.summary.value] == [("reward/mean", 2.5), ("kl", -0.25)]
    assert (second.step, second.summary.value[0].tag) == (300, "grösse")
    assert abs(first.wall_time - path.stat().st_mtime) < 60


def test_a_moment_can_be_given(tmp_path):
    file = EventFile(tmp_path)
    file.write(1, {"kl": 1.0}, wall_s=1.5e9)
    file.close()
    (path,) = tmp_path.iterdir()
    assert events(path)[-1].wall_time == 1.5e9


def test_a_resumed_run_starts_a_second_file_that_takes_over(tmp_path):
    EventFile(tmp_path).close()
    EventFile(tmp_path, first_step=7).close()
    earlier, later = sorted(tmp_path.iterdir())
    assert len(events(earlier)) == 1
    start = events(later)[1]
    assert (start.step, start.session_log.status) == (7, event_pb2.SessionLog.START)


def test_a_negative_step_is_refused(tmp_path):
    with pytest.raises(ValueError, match="step -1: expected 0 or more"):
        EventFile(tmp_path).write(-1, {})
