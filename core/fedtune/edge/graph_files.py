"""A check of .onnx files: a graph must not refer to other files, which no digest of the pack would cover.

    check_self_contained(directory / "forward.onnx")

An .onnx file is a Protocol Buffers message, in which a tensor may name a file beside it instead of holding its values.
onnxruntime would read that file from wherever the name points to. This module walks through the message, by the field
numbers of https://github.com/onnx/onnx/blob/main/onnx/onnx.proto, so that devices need no package for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fedtune.core.errors import ModelError
from fedtune.edge.pack_facts import REMEDY

_TENSOR = "tensor"
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14  # fields of a tensor; the location is 0 where the tensor has its own values
# Message -> number of a field -> the message in it; other fields can hold no tensor.
_PARTS = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: _TENSOR, 15: "sparse"},
    "sparse": {1: _TENSOR, 2: _TENSOR},
    "node": {5: "attribute"},
    "attribute": {5: _TENSOR, 6: "graph", 10: _TENSOR, 11: "graph", 22: "sparse", 23: "sparse"},
    _TENSOR: {},
}
_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5  # wire types
_DEEPEST = 32


def check_self_contained(path: Path) -> None:
    """Checks that all tensors of a graph are in its own file.

    Raises:
        ModelError: one is not, or the file is no graph; the message names the file and the remedy.
    """
    try:
        external = _refers(memoryview(path.read_bytes()), "model", 0)
    except (ValueError, IndexError) as error:
        raise ModelError(f"{path}: not a graph: {error}; {REMEDY}") from error
    if external:
        raise ModelError(f"{path}: refers to weights in another file, which no digest covers; {REMEDY}")


def _refers(message: memoryview, kind: str, depth: int) -> bool:
    """Returns whether a tensor in the message refers to a file."""
    if depth > _DEEPEST:
        raise ValueError(f"nested deeper than {_DEEPEST} messages")
    for number, content in _fields(message):
        if kind == _TENSOR and (number == _EXTERNAL_DATA or (number == _DATA_LOCATION and content)):
            return True
        part = _PARTS[kind].get(number)
        if part and isinstance(content, memoryview) and _refers(content, part, depth + 1):
            return True
    return False


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """Yields each field's number, with its bytes, or 0 for a field of another wire type."""
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        number, wire = key >> 3, key & 7
        if wire == _LENGTH:
            size, place = _varint(message, place)
            if place + size > len(message):
                raise ValueError("it ends within a field")
            yield number, message[place : place + size]
            place += size
        elif wire == _VARINT:
            value, place = _varint(message, place)
            yield number, value
        elif wire in (_EIGHT_BYTES, _FOUR_BYTES):
            place += 8 if wire == _EIGHT_BYTES else 4
            yield number, 0
        else:
            raise ValueError(f"a field has wire type {wire}")


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    """Returns a number in base 128, its lowest digits first, and the place after it."""
    value = shift = 0
    while True:
        byte = message[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if not byte & 0x80:
            return value, place
        if shift > 63:
            raise ValueError("a number is longer than 64 bits")
