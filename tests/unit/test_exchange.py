"""Packets on a stream: cut anywhere, and put together again."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wove import frames
from wove.errors import ProtocolError
from wove.exchange import (
    Packet,
    PacketReader,
    chunked,
    encode_cancel,
    encode_note,
    encode_run,
    framed,
    lost_frame,
    split_packets,
)
from wove.wire import encode_value, pack_message

RUN = "0123456789abcdef" * 2


def joined(parts: list[Any]) -> bytes:
    """The bytes of a packet."""
    return b"".join(parts)


def outcome(value: Any) -> bytes:
    """A packet with a result."""
    attachments: list[Any] = []
    described = encode_value(value, attachments)
    return joined(
        pack_message(frames.event(frames.TASK_RESULT, RUN, "t", 1, 2, result=described), attachments)
    )


class TestReader:
    """A stream is read whole, however it is cut."""

    @given(
        st.lists(st.binary(max_size=300), max_size=8), st.lists(st.integers(1, 97), min_size=1, max_size=30)
    )
    def test_any_cut(self, packets: list[bytes], cuts: list[int]) -> None:
        stream = b"".join(joined(framed([packet])) for packet in packets)
        reader = PacketReader()
        found, at, turn = [], 0, 0
        while at < len(stream):
            step = cuts[turn % len(cuts)]
            found += [bytes(packet) for packet in reader.feed(stream[at : at + step])]
            at, turn = at + step, turn + 1
        assert found == packets
        assert reader.idle
        assert [bytes(packet) for packet in split_packets(stream)] == packets

    def test_a_large_one_is_read_into_place(self) -> None:
        packet = bytes(range(256)) * 1_000
        stream = memoryview(joined(framed([packet])))
        reader = PacketReader()
        assert reader.feed(stream[:100]) == []
        done, at = None, 100
        while (room := reader.room()) is not None:
            count = min(70_000, room.nbytes)
            room[:count] = stream[at : at + count]
            at += count
            done = reader.filled(count)
        assert done is None
        assert [bytes(found) for found in reader.feed(stream[at:])] == [packet]

    def test_one_that_is_too_large_is_refused_before_it_is_held(self) -> None:
        with pytest.raises(ProtocolError, match="4294967295 bytes is larger than allowed"):
            PacketReader(1_000).feed(b"\xff\xff\xff\xff")

    @pytest.mark.parametrize("body", [b"\x00", b"\x00\x00\x00\x05abc", b"\x00\x00\x00\x01ab"])
    def test_packets_fill_their_body(self, body: bytes) -> None:
        with pytest.raises(ProtocolError):
            list(split_packets(body))
        with pytest.raises(ProtocolError):
            list(split_packets(b"\x00\x00\x01\x00" + bytes(256), limit=255))

    @given(st.lists(st.binary(max_size=50), max_size=20), st.integers(1, 40))
    def test_chunks_are_the_stream(self, pieces: list[bytes], size: int) -> None:
        chunks = list(chunked(pieces, size))
        assert b"".join(chunks) == b"".join(pieces)
        assert all(len(chunk) <= size for chunk in chunks)


class TestPackets:
    """Commands and events."""

    def test_a_command(self) -> None:
        frame = {
            "run_id": RUN,
            "task_id": "a.task",
            "callable": abs,
            "args": {},
            "positional": (-1,),
            "delivery": {"attempt": 2, "heartbeat_seconds": 9.0},
            "max_body": 77,
        }
        packet = Packet(joined(encode_run(frame)))
        assert (packet.kind, packet.run_id, packet.task_id, packet.attempt) == ("run_task", RUN, "a.task", 2)
        assert packet.envelope["callable"] == "builtins:abs"
        assert packet.envelope["max_body"] == 77
        assert not packet.is_terminal

    def test_a_result_and_which_of_them_need_care(self) -> None:
        light = Packet(outcome((1, "two")))
        assert not light.needs_care
        assert light.event()["result"] == (1, "two")
        assert Packet(outcome(range(3))).needs_care  # a pickle
        assert Packet(outcome(b"x" * 100_000)).needs_care  # large
        assert not Packet(joined(encode_cancel(RUN))).needs_care

    def test_a_result_that_cannot_be_rebuilt_is_its_runs_error(self) -> None:
        frame = frames.event(frames.TASK_RESULT, RUN, "t", 1, 2, result=["pickle", 0, 1])
        packet = Packet(joined(pack_message(frame, [b"cno_such_module\nthing\n."])))
        event = packet.event()
        assert event["type"] == frames.TASK_ERROR
        assert event["error"]["kind"] == "ResultDecodeError"
        assert "result" not in event

    def test_a_lost_run(self) -> None:
        frame = lost_frame(RUN, "t", "gone", seq=5)
        assert frames.check_event(frame)
        assert frame["error"]["kind"] == "WorkerLostError"

    @pytest.mark.parametrize(
        "raw",
        [
            b"",
            b"\x00\x00\x00\x01",
            joined(pack_message({"no": "type"}, [])),
            joined(pack_message({"type": 7}, [])),
            b"\x00\x00\x00\x03" + msgpack.packb([1, 2]),
        ],
    )
    def test_malformed_ones(self, raw: bytes) -> None:
        with pytest.raises(ProtocolError):
            Packet(raw)

    @pytest.mark.parametrize("run_id", [None, 7, "short", RUN.upper(), [RUN]])
    def test_a_run_id_that_is_none(self, run_id: Any) -> None:
        packet = Packet(joined(encode_note("cancel_task", run_id=run_id, run_ids=run_id)))
        with pytest.raises(ProtocolError):
            _ = packet.run_id
        if run_id != [RUN]:
            with pytest.raises(ProtocolError):
                _ = packet.run_ids
