"""The directory of a zip archive whose records are stored uncompressed in the file, as torch writes it.

Programs read odd archives in different ways, and so one program's check says nothing about what another one loads. All
that could be read in two ways is refused here: a directory that is not the very end of the file, two records of one
name, records that overlap, headers that disagree. Checksums are not looked at: torch may leave them out.
"""

from __future__ import annotations

import os
import struct
from io import FileIO
from typing import Any, NamedTuple

from convert.files.source import MAX_NAME, CheckpointError, read_at

DIRECTORY_BOUND = 64 * 2**20  # bytes
RECORD_BOUND = 200_000
ALL_ONES = 0xFFFFFFFF  # stands where the number is in the zip64 fields
ENCRYPTED = 0x2041  # flags: encrypted, strongly encrypted, masked headers
SIZES_FOLLOW = 0x8  # flag: the sizes in a record's own header may be zero

END = struct.Struct("<4s4H2IH")  # signature, 2 disks, 2 counts of records, directory's size and begin, comment's size
LOCATOR = struct.Struct("<4sIQI")  # signature, disk, begin of END64, disks
END64 = struct.Struct("<4sQ4x2I4Q")  # signature, own size less 12, 2 disks, 2 counts, directory's size and begin
# signature, flags, method, packed and real size, sizes of name, extra and comment, disk, begin of the record's header
ENTRY = struct.Struct("<4s4x2H8x2I4H6xI")
HEADER = struct.Struct("<4s2x2H8x2I2H")  # signature, flags, method, packed and real size, sizes of name and extra


class Record(NamedTuple):
    """Where a record's bytes are in the file."""

    begin: int
    size: int


class Entry(NamedTuple):
    """What the directory says about a record."""

    name: bytes
    flags: int
    method: int
    packed: int
    size: int
    header: int

    @property
    def text(self) -> str:
        return self.name.decode("utf-8", "surrogateescape")


def read_directory(file: FileIO) -> tuple[list[Entry], int]:
    """All entries of the directory, with sound and different names, and where the directory begins in the file.

    Raises:
        CheckpointError: there is none, it is damaged, or a name is refused.
    """
    path = file.name
    begin, length, count = _find_directory(file)
    data = read_at(file, begin, length).tobytes()
    entries: dict[bytes, Entry] = {}
    at = 0
    for _ in range(count):
        if at + ENTRY.size > length:
            raise _damaged(file)
        signature, flags, method, *sizes, name_size, extra_size, comment_size, disk, header = ENTRY.unpack_from(
            data, at
        )
        at += ENTRY.size
        name, extra = data[at : at + name_size], data[at + name_size : at + name_size + extra_size]
        at += name_size + extra_size + comment_size
        size, packed, header = _wide(extra, [*reversed(sizes), header])
        entry = Entry(name, flags, method, packed, size, header)
        if signature != b"PK\x01\x02" or disk or at > length or max(packed, header) > begin:
            raise _damaged(file)
        if name in entries:
            raise CheckpointError(f"{path}: the record {entry.text!r} is there twice, and only one can count; refused")
        odd = b".." in name.split(b"/") or name.startswith(b"/") or b"\\" in name or b"\0" in name
        if odd or len(name) > MAX_NAME:
            raise CheckpointError(f"{path}: a record is called {entry.text[:60]!r}; refused")
        entries[name] = entry
    if at != length:
        raise _damaged(file)
    return list(entries.values()), begin


def locate(file: FileIO, entries: list[Entry], directory: int) -> dict[str, Record]:
    """Where the records are, in the order of the file. directory: where the directory begins, behind all records.

    Raises:
        CheckpointError: a record is compressed or encrypted, its own header says something else, or records overlap.
    """
    records: dict[str, Record] = {}
    free = 0
    for entry in sorted(entries, key=lambda entry: entry.header):
        what = f"{file.name}: the record {entry.text!r}"
        if entry.flags & ENCRYPTED:
            raise CheckpointError(f"{what} is encrypted; unpack the file first")
        if entry.method or entry.packed != entry.size:
            raise CheckpointError(f"{what} is compressed; load and save the file again with torch")
        if entry.header < free:
            raise CheckpointError(f"{what} overlaps another; refused")
        if entry.header + HEADER.size > directory:
            raise _damaged(file)
        signature, flags, method, packed, size, name_size, extra_size = _unpack(HEADER, file, entry.header)
        begin = entry.header + HEADER.size + name_size + extra_size
        free = begin + entry.size
        if signature == bytes(4):
            raise _zeros(file)
        if signature != b"PK\x03\x04" or free > directory:
            raise _damaged(file)
        name = read_at(file, entry.header + HEADER.size, name_size).tobytes()
        if not name or b"\0" in name:
            raise _zeros(file)
        sizes = {entry.size, ALL_ONES} | ({0} if flags & SIZES_FOLLOW else set())
        if name != entry.name or method or flags & ENCRYPTED or not {packed, size} <= sizes:
            raise CheckpointError(f"{what} is something else by its own header than by the directory; refused")
        records[entry.text] = Record(begin, entry.size)
    return records


def _find_directory(file: FileIO) -> tuple[int, int, int]:
    """The directory's place, size and number of entries, from the end of the file."""
    size = os.fstat(file.fileno()).st_size
    end = size - END.size
    if end < 0:
        raise _damaged(file)
    signature, *numbers, comment = _unpack(END, file, end)
    if signature != b"PK\x05\x06" or comment:
        raise _damaged(file)
    locator = _unpack(LOCATOR, file, end - LOCATOR.size) if end >= LOCATOR.size + END64.size else (b"", 0, 0, 0)
    if locator[0] == b"PK\x06\x07":
        end -= LOCATOR.size + END64.size
        if locator[1:] != (0, end, 1):
            raise _damaged(file)
        signature, length, *wide = _unpack(END64, file, end)
        short = [ALL_ONES if i > 3 else 0xFFFF for i in range(6)]
        agree = all(number in (full, ones) for number, full, ones in zip(numbers, wide, short, strict=True))
        if signature != b"PK\x06\x06" or length != END64.size - 12 or not agree:
            raise _damaged(file)
        numbers = wide
    disk, other_disk, count, all_count, length, begin = numbers
    if disk or other_disk or count != all_count or begin + length != end:
        raise _damaged(file)
    if length > DIRECTORY_BOUND or count > RECORD_BOUND:
        raise CheckpointError(f"{file.name}: a zip directory of {count} records; expected at most {RECORD_BOUND}")
    return begin, length, count


def _unpack(layout: struct.Struct, file: FileIO, at: int) -> tuple[Any, ...]:
    return layout.unpack(read_at(file, at, layout.size).tobytes())


def _wide(extra: bytes, numbers: list[int]) -> list[int]:
    """The numbers of an entry, those that stand in its zip64 field taken from there."""
    while len(extra) >= 4:
        kind, size = struct.unpack_from("<HH", extra)
        if kind == 1:
            field = extra[4 : 4 + size]
            for i, number in enumerate(numbers):
                if number == ALL_ONES and len(field) >= 8:
                    numbers[i], field = int.from_bytes(field[:8], "little"), field[8:]
            break
        extra = extra[4 + size :]
    return numbers


def _zeros(file: FileIO) -> CheckpointError:
    return CheckpointError(
        f"{file.name}: a part of the file is filled with zeros; the download is not complete, get it again"
    )


def _damaged(file: FileIO) -> CheckpointError:
    return CheckpointError(f"{file.name}: the zip directory at its end is missing or damaged; get the file again")
