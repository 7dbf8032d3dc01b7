"""Pickles read as data: an interpreter of the few opcodes that `torch.save` writes, to which no object is known.

Python's own unpickler calls whatever a file names. This one has no way to import or call anything: a name in a pickle
is answered from an allow-list of functions of ours, which take plain values and give plain values, and any other name,
opcode or protocol is refused. So `pickle` is not used at all. What a hostile file can cost is bounded by its own size:
no length is believed before the bytes are there, the memo is a dictionary, and nothing is walked recursively.

A list of integers, which is most of an adapter of composable-sft, is decoded a batch at a time: a list holds such a
batch as one numpy array (`integers` puts them together), so that 7.67 million numbers take two seconds.

Source of the opcodes: Python's `pickletools`, protocol 2.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import FormatError

PROTOCOL = 2
_PROTO = 0x80
# Picklers write batches of 1,000 pairs, so that an honest stack is about as high as twice that.
_MAX_STACK = 10_000
_MAX_MARKS = 100
_MAX_INTEGER_BYTES = 8
# MARK, integers of one, two or four bytes, APPENDS. Each alternative starts with its own opcode, so it ends where the
# next one begins. The bound keeps the memory of the match small.
_BATCH = re.compile(rb"\(((?:K.|M..|J....){1,10000})e", re.DOTALL)
_ONE_BYTE, _TWO_BYTES = ord("K"), ord("M")

# What stands for a name in a pickle: takes the arguments it is called with there, and gives a plain value.
StandIn = Callable[[tuple[Any, ...]], Any]


@dataclass(frozen=True)
class _Name:
    """A name of the allow-list, as it lies on the stack."""

    text: str
    stand_in: StandIn


class OrderedDict(dict[Any, Any]):
    """Stands for `collections.OrderedDict`, which state dicts are."""


@dataclass(frozen=True)
class NumpyDtype:
    """Stands for `numpy.dtype`.

    Attributes:
        code: as numpy spells it: "i8", "f4".
    """

    code: str


class Unpickler:
    """Reads pickles that lie one after the other in some bytes.

    Args:
        data: the bytes.
        names: {(module, name): a `StandIn` for what is called, or the value that a name stands for}; no other name may
            occur.
        persistent: what is done with a persistent id (torch's storages).
        source: what errors call the file.
        position: where the first pickle begins.

    Attributes:
        position: where the next pickle begins.
    """

    def __init__(
        self,
        data: bytes,
        *,
        names: Mapping[tuple[str, str], Any],
        persistent: Callable[[Any], Any],
        source: str,
        position: int = 0,
    ) -> None:
        self.position = position
        self._data, self._names, self._persistent, self._source = data, names, persistent, source
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def load(self) -> Any:
        """The value of the next pickle: numbers, texts, tuples, lists, dictionaries, and what the stand-ins give.

        Raises:
            FormatError: it is cut off or damaged, or holds what the format has not; the message says what.

        Cost: one pass over the bytes; memory in proportion to them.
        """
        self._stack, self._marks, self._memo = [], [], {}
        start, protocol = self._take(2)
        if start != _PROTO or protocol != PROTOCOL:
            found = f"protocol {protocol}" if start == _PROTO else "no protocol that it names"
            raise self.error(
                f"is pickled by {found}, and the format's is protocol {PROTOCOL}, which torch.save writes unless it "
                "is told otherwise"
            )
        while (opcode := self._take(1)) != b".":
            action = _ACTIONS.get(opcode)
            if action is None:
                raise self.error(f"holds the pickle opcode {opcode!r}, which is not part of this format")
            action(self)
            if len(self._stack) > _MAX_STACK or len(self._marks) > _MAX_MARKS:
                raise self.error("is nested deeper than this format can be")
        if len(self._stack) != 1 or self._marks:
            raise self.error("holds a damaged pickle, which does not end in one value")
        return self._stack.pop()

    def error(self, what: str) -> FormatError:
        """An error about the file."""
        return FormatError(f"{self._source} {what}. Nothing of it was executed. Get the file again from who made it.")

    # Bytes and the stack

    def _take(self, count: int) -> bytes:
        taken = self._data[self.position : self.position + count]
        if len(taken) < count:
            raise self.error("is cut off")
        self.position += count
        return taken

    def _number(self, code: str) -> Any:
        return struct.unpack(code, self._take(struct.calcsize(code)))[0]

    def _line(self) -> str:
        end = self._data.find(b"\n", self.position, self.position + 256)
        if end < 0:
            raise self.error("is cut off in a name")
        line = self._take(end + 1 - self.position)[:-1]
        return line.decode("ascii", "replace")

    def _pop(self) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise self.error("holds a damaged pickle, which takes a value that is not there")
        return self._stack.pop()

    def _top(self, kind: type) -> Any:
        value = self._pop()
        self._stack.append(value)
        if not isinstance(value, kind):
            raise self.error(f"holds a damaged pickle: a {type(value).__name__} in the place of a {kind.__name__}")
        return value

    def _pop_to_mark(self) -> list[Any]:
        if not self._marks:
            raise self.error("holds a damaged pickle, which ends a group that has not begun")
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    # Opcodes

    def _integer(self) -> None:
        count = self._take(1)[0]
        if count > _MAX_INTEGER_BYTES:
            raise self.error(f"holds an integer of {count} bytes, and the format has none of more than 8")
        self._stack.append(int.from_bytes(self._take(count), "little", signed=True))

    def _text(self) -> None:
        try:
            self._stack.append(self._take(self._number("<I")).decode("utf-8", "surrogatepass"))
        except UnicodeDecodeError as error:
            raise self.error(f"holds a damaged text ({error.reason})") from error

    def _mark(self) -> None:
        batch = _BATCH.match(self._data, self.position - 1)
        if batch is not None and self._stack and type(self._stack[-1]) is list:
            self._top(list).append(_decode_batch(batch[1]))
            self.position = batch.end()
        else:
            self._marks.append(len(self._stack))

    def _tuple(self, count: int) -> None:
        items = [self._pop() for _ in range(count)]
        self._stack.append(tuple(reversed(items)))

    def _remember(self, index: int) -> None:
        self._memo[index] = self._top(object)

    def _recall(self, index: int) -> None:
        if index not in self._memo:
            raise self.error("holds a damaged pickle, which recalls a value that it did not store")
        self._stack.append(self._memo[index])

    def _append(self, items: list[Any]) -> None:
        self._top(list).extend(items)

    def _set_items(self, items: list[Any]) -> None:
        target = self._top(dict)
        if len(items) % 2:
            raise self.error("holds a damaged pickle: a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Hashing a tuple goes as deep as it is nested.
            if type(key) not in (str, int):
                raise self.error(
                    f"has a {type(key).__name__} as the key of a dictionary, and the format has only texts"
                )
            target[key] = value

    def _global(self) -> None:
        module, name = self._line(), self._line()
        if (module, name) not in self._names:
            raise self.error(f"names {module}.{name}, which is not part of this format")
        meaning = self._names[module, name]
        self._stack.append(_Name(f"{module}.{name}", meaning) if callable(meaning) else meaning)

    def _reduce(self) -> None:
        arguments, name = self._pop(), self._pop()
        if not isinstance(name, _Name) or not isinstance(arguments, tuple):
            raise self.error(f"calls a {type(name).__name__}, and the format calls only names")
        try:
            self._stack.append(name.stand_in(arguments))
        except (TypeError, ValueError, IndexError, OverflowError) as error:
            reason = f": {error}" if isinstance(error, FormatError) else ""
            raise self.error(f"calls {name.text} with what it cannot be called with{reason}") from error

    def _build(self) -> None:
        state, value = self._pop(), self._top(object)
        if isinstance(value, OrderedDict) and isinstance(state, dict):
            return  # the versions of modules, in state dicts
        # (version, byte order, ...), of which only the order could change what a number is.
        if not (isinstance(value, NumpyDtype) and isinstance(state, tuple) and state[1:2] in [("<",), ("|",), ("=",)]):
            raise self.error(f"sets the state of a {type(value).__name__}, which the format does not")

    def _persistent_id(self) -> None:
        self._stack.append(self._persistent(self._pop()))


def _constant(make: Callable[[], Any]) -> Callable[[Unpickler], None]:
    return lambda machine: machine._stack.append(make())


def _number(code: str) -> Callable[[Unpickler], None]:
    return lambda machine: machine._stack.append(machine._number(code))


_ACTIONS: dict[bytes, Callable[[Unpickler], None]] = {
    b"N": _constant(lambda: None),
    b"\x88": _constant(lambda: True),
    b"\x89": _constant(lambda: False),
    b"}": _constant(dict),
    b"]": _constant(list),
    b")": _constant(tuple),
    b"K": _number("<B"),
    b"M": _number("<H"),
    b"J": _number("<i"),
    b"G": _number(">d"),
    b"\x8a": Unpickler._integer,
    b"X": Unpickler._text,
    b"(": Unpickler._mark,
    b"t": lambda machine: machine._stack.append(tuple(machine._pop_to_mark())),
    b"\x85": lambda machine: machine._tuple(1),
    b"\x86": lambda machine: machine._tuple(2),
    b"\x87": lambda machine: machine._tuple(3),
    b"q": lambda machine: machine._remember(machine._number("<B")),
    b"r": lambda machine: machine._remember(machine._number("<I")),
    b"h": lambda machine: machine._recall(machine._number("<B")),
    b"j": lambda machine: machine._recall(machine._number("<I")),
    b"a": lambda machine: machine._append([machine._pop()]),
    b"e": lambda machine: machine._append(machine._pop_to_mark()),
    b"s": lambda machine: machine._set_items([machine._pop(), machine._pop()][::-1]),
    b"u": lambda machine: machine._set_items(machine._pop_to_mark()),
    b"c": Unpickler._global,
    b"R": Unpickler._reduce,
    b"b": Unpickler._build,
    b"Q": Unpickler._persistent_id,
}


def _decode_batch(batch: bytes) -> NDArray[np.int32]:
    """The integers of a run of BININT1, BININT2 and BININT opcodes, which have 32 bits at most."""
    raw = np.frombuffer(batch, dtype=np.uint8)
    # If every second byte is that opcode, from the first on, then all of them are one-byte integers.
    if raw.size % 2 == 0 and bool((raw[::2] == _ONE_BYTE).all()):
        return raw[1::2].astype(np.int32)
    numbers: list[int] = []
    rest = iter(batch)
    for opcode in rest:
        if opcode == _ONE_BYTE:
            numbers.append(next(rest))
        elif opcode == _TWO_BYTES:
            numbers.append(next(rest) | next(rest) << 8)
        else:
            word = bytes((next(rest), next(rest), next(rest), next(rest)))
            numbers.append(int.from_bytes(word, "little", signed=True))
    return np.array(numbers, dtype=np.int32)


def integers(items: Any) -> NDArray[np.int64] | None:
    """[n] the integers of an unpickled list; None if it is no list of integers."""
    if not isinstance(items, list):
        return None
    chunks: list[NDArray[Any]] = []
    single: list[int] = []
    for item in items:
        if isinstance(item, np.ndarray):
            chunks += [np.array(single, dtype=np.int64), item]
            single = []
        elif type(item) is int and -(2**63) <= item < 2**63:
            single.append(item)
        else:
            return None
    return np.concatenate([*chunks, np.array(single, dtype=np.int64)])  # in 64 bits, as the widest part is
