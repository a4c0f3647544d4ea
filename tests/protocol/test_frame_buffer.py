from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tui_trainer.protocol.framing import FrameBuffer, ProtocolError, encode
from tui_trainer.protocol.messages import Ack, Refused, Status, Update, Welcome

MESSAGES = (
    Welcome(1, "0", "quiet-otter", 3),
    Update(Status(step=3, reason="x" * 500)),
    Ack(1, True, Status()),
)


@given(cuts=st.lists(st.integers(0, 2000)))
def test_messages_come_out_whole_however_the_stream_is_cut(cuts):
    stream = b"".join(encode(message) for message in MESSAGES)
    places = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    frames, received = FrameBuffer(), []
    for low, high in itertools.pairwise(places):
        received += frames.feed(stream[low:high])
    assert tuple(received) == MESSAGES
    assert not frames.inside


@given(st.lists(st.binary(max_size=80), max_size=10))
def test_noise_is_refused_or_awaited(pieces):
    frames = FrameBuffer()
    try:
        for piece in pieces:
            for message in frames.feed(piece):
                assert isinstance(message, Welcome | Update | Ack | Refused)
    except ProtocolError:
        assert len(b"".join(pieces)) >= 4


def test_a_frame_over_the_limit_is_refused_before_it_is_read():
    with pytest.raises(ProtocolError, match="over the limit"):
        FrameBuffer().feed(b"\xff\xff\xff\xff")
