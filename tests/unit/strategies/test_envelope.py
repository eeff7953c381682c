"""Payloads in Flower messages: their encoding, and the refusals of invalid ones."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.task_identity import TaskIdentity

from fedtune.core.errors import PeerError
from fedtune.core.protocol.messages import EVALUATE, OPEN, TRAIN, query
from fedtune.flower.envelope import MAX_SHORT_BYTES, seal, unseal_parts


def message(content: RecordDict) -> Message:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    return Message(content, 2, "query", ttl=60)


def stored(data: bytes) -> Array:
    return Array("uint8", (3,), "numpy.ndarray", data)


def header(shape: str) -> bytes:
    """Makes a .npy header without any values."""
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def archive() -> bytes:
    file = BytesIO()
    np.savez(file, np.zeros(3))
    return file.getvalue()


@pytest.mark.parametrize("sizes", [(0,), (1,), (MAX_SHORT_BYTES,), (MAX_SHORT_BYTES + 1,), (10, MAX_SHORT_BYTES)])
def test_parts_of_every_size_come_back_bit_for_bit(sizes: tuple[int, ...]) -> None:
    parts = tuple(np.random.default_rng(size).bytes(size) for size in sizes)
    assert unseal_parts(message(seal(*parts)), len(parts)) == parts


def test_a_short_payload_travels_as_fewer_objects_than_an_array_would() -> None:
    short = get_all_nested_objects(message(seal(bytes(MAX_SHORT_BYTES))))
    long = get_all_nested_objects(message(seal(bytes(MAX_SHORT_BYTES + 1))))
    assert (len(short), len(long)) == (3, 5)


@pytest.mark.parametrize(
    "content",
    [
        RecordDict({"fedtune": ConfigRecord({"part-0": "text"})}),
        RecordDict({"fedtune": ConfigRecord({"part-0": 1})}),
        RecordDict({"fedtune": ConfigRecord({"part-1": b""})}),
        RecordDict({"fedtune": ConfigRecord({"part-0": b"", "part-1": b""})}),
        RecordDict({"other": ConfigRecord({"part-0": b""})}),
        RecordDict({"fedtune": ArrayRecord({"part-0": Array(np.zeros(3))})}),
        RecordDict({"fedtune": ArrayRecord({"part-0": Array(np.zeros((2, 2), dtype=np.uint8))})}),
        RecordDict({"fedtune": ArrayRecord({"part-0": stored(header("(1125899906842624,)"))})}),
        RecordDict({"fedtune": ArrayRecord({"part-0": stored(header("(3,)"))})}),
        RecordDict({"fedtune": ArrayRecord({"part-0": stored(header("(" * 100))})}),
        RecordDict({"fedtune": ArrayRecord({"part-0": stored(archive())})}),
        RecordDict({}),
    ],
)
def test_anything_else_than_one_part_of_bytes_is_refused(content: RecordDict) -> None:
    with pytest.raises(PeerError):
        unseal_parts(message(content), 1)


def test_actions_are_flower_s_message_types() -> None:
    assert (MessageType.TRAIN, MessageType.EVALUATE) == (TRAIN, EVALUATE)
    assert query(OPEN) == f"{MessageType.QUERY}.open"
