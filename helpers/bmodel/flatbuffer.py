"""A flatbuffer of which nothing is trusted: whatever its bytes, a read gives a value or raises one of MALFORMED.

The flatbuffers package does not: its tables slice in Python, without a look at where the buffer ends.
"""

import struct
from collections.abc import Iterator

# A bmodel of 80 layers has some 10^5; a file that makes us look at more than this was made to.
MOST_TABLES = 5_000_000


# What is read lies outside of the buffer, or is no text, or there is no end to it.
MALFORMED = (struct.error, ValueError)


class Buffer:
    """The bytes, and how many tables were looked at. Number codes are those of `struct`."""

    def __init__(self, data: bytes):
        self.data = data
        self.tables = 0

    def unpack(self, codes: str, position: int) -> tuple:
        if position < 0:  # which struct would count from the end
            raise ValueError
        return struct.unpack_from("<" + codes, self.data, position)

    def number(self, code: str, position: int) -> int:
        return self.unpack(code, position)[0]

    def follow(self, position: int) -> int:
        return position + self.number("I", position)

    def root(self) -> "Table":
        return self.table(self.follow(0))

    def table(self, position: int) -> "Table":
        self.tables += 1
        if self.tables > MOST_TABLES:
            raise ValueError
        return Table(self, position)


class Table:
    """A table of the flatbuffer; fields by their id in the schema. A field that is absent is 0, "" or empty."""

    def __init__(self, buffer: Buffer, position: int):
        self.buffer, self.position = buffer, position
        self.vtable = position - buffer.number("i", position)
        self.vtable_bytes = buffer.number("H", self.vtable)

    def _at(self, field_id: int) -> int | None:
        entry = 4 + 2 * field_id
        if entry + 2 > self.vtable_bytes:
            return None
        offset = self.buffer.number("H", self.vtable + entry)
        return self.position + offset if offset else None

    def number(self, field_id: int, code: str) -> int:
        at = self._at(field_id)
        return 0 if at is None else self.buffer.number(code, at)

    def place(self, field_id: int) -> int | None:
        """Where the string, table or vector of a field begins; None where there is none."""
        at = self._at(field_id)
        return None if at is None else self.buffer.follow(at)

    def string(self, field_id: int) -> str:
        place = self.place(field_id)
        if place is None:
            return ""
        (text,) = self.buffer.unpack(f"{self.buffer.number('I', place)}s", place + 4)
        return text.decode("utf-8")

    def table(self, field_id: int) -> "Table | None":
        place = self.place(field_id)
        return None if place is None else self.buffer.table(place)

    def numbers(self, field_id: int, code: str) -> tuple[int, ...]:
        place = self.place(field_id)
        return () if place is None else self.buffer.unpack(f"{self.buffer.number('I', place)}{code}", place + 4)

    def tables(self, field_id: int) -> "Iterator[Table]":
        for i, offset in enumerate(self.numbers(field_id, "I"), start=1):
            yield self.buffer.table(self.place(field_id) + 4 * i + offset)

    def binary(self, field_id: int) -> tuple[int, int]:
        """(start, size) of a Binary struct; (0, 0) where there is none."""
        at = self._at(field_id)
        return (0, 0) if at is None else self.buffer.unpack("QQ", at)
