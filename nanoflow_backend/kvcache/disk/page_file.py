"""A page file holds one page whole: 4 KiB of header, then the payload, and a checksum over both.

    offset  bytes  field
    0       8      magic, "NanoFlKV"
    8       4      version of this format
    12      4      bytes of the header, 4096: the payload begins on a block of the disk
    16      8      bytes of the payload
    24      32     digest of the PageLayout
    56      32     content hash of the page
    88      32     content hash of the page before it, zeros for the first of a prompt
    120     2      bytes of what follows
    122     ...    the PageLayout as JSON, for people
    4088    8      xxh3_64 of all before it and of the payload

Integers have their lowest byte first. What is between is zero. Nothing of a file is believed before all of it has been
compared: a page with one wrong bit gives wrong tokens, and no error.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from errno import EIO
from hashlib import blake2b
from mmap import mmap

import msgspec
import xxhash

from nanoflow_backend.kvcache.content_hash import HASH_BYTES
from nanoflow_backend.kvcache.disk.disk_stats import Refusal
from nanoflow_backend.kvcache.disk.file_system import FileSystem

MAGIC = b"NanoFlKV"
VERSION = 1
HEADER_BYTES = 4096
_FIELDS = struct.Struct(f"<8sIIQ32s{HASH_BYTES}s{HASH_BYTES}sH")
_CHECKSUM = struct.Struct("<Q")
_CHECKED = HEADER_BYTES - _CHECKSUM.size


class PageLayout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the bytes of a payload depend on beside the tokens: pages are exchanged between equal ones only."""

    weights: str  # fingerprint of the checkpoint
    precision: str  # of weights, activations and KV cache
    layout: str  # order of axes in a payload, and the sizes of all of them
    page_tokens: int
    rank: int  # of the tensor-parallel group, whose ranks hold different heads
    world: int
    payload_bytes: int

    @property
    def digest(self) -> bytes:
        """32 bytes, the same in every process; another one for each version of this format."""
        return blake2b(b"%d " % VERSION + msgspec.json.encode(self), digest_size=32).digest()

    @property
    def file_bytes(self) -> int:
        """What each of its pages takes on the disk."""
        return HEADER_BYTES + self.payload_bytes


class RefusedError(Exception):
    """A file that is not what it should be; `reason` says why."""

    def __init__(self, reason: Refusal, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def page_header(layout: PageLayout, content: bytes, parent: bytes, payload: memoryview) -> bytes:
    """The first HEADER_BYTES of a page's file. content, parent: hashes of HASH_BYTES; payload: contiguous bytes.

    Raises:
        ValueError: a hash or the payload has another size, or the layout is too long to be written.
    """
    if payload.nbytes != layout.payload_bytes:
        raise ValueError(f"payload: expected {layout.payload_bytes} bytes, got {payload.nbytes}")
    if len(content) != HASH_BYTES or len(parent) != HASH_BYTES:
        raise ValueError(f"content, parent: expected {HASH_BYTES} bytes each, got {len(content)} and {len(parent)}")
    text = msgspec.json.encode(layout)
    if _FIELDS.size + len(text) > _CHECKED:
        raise ValueError(f"layout: expected {_CHECKED - _FIELDS.size} bytes of JSON at most, got {len(text)}")
    fields = (MAGIC, VERSION, HEADER_BYTES, layout.payload_bytes, layout.digest, content, parent, len(text))
    checked = (_FIELDS.pack(*fields) + text).ljust(_CHECKED, b"\0")
    return checked + _CHECKSUM.pack(_checksum(checked, payload))


def write_page(
    files: FileSystem, fd: int, layout: PageLayout, content: bytes, parent: bytes, payload: memoryview
) -> None:
    """Write a page's file from its beginning; see page_header.

    Raises:
        OSError: the file is not whole.
        ValueError: see page_header.
    """
    pieces = [memoryview(page_header(layout, content, parent, payload)), payload.cast("B")]
    if missing := _transfer(pieces, lambda rest, offset: files.write(fd, rest, offset)):
        raise OSError(EIO, f"{missing} bytes could not be written")


def read_page(
    files: FileSystem,
    fd: int,
    layout: PageLayout,
    content: bytes,
    payload: memoryview,
    aligned: memoryview | None = None,
) -> None:
    """Fill the payload, contiguous bytes, if the file is this page. `aligned` has room for the file in whole blocks:
    where it is given, the file is read there first.

    Raises:
        RefusedError: it is not; the payload holds anything then.
        OSError: it could not be read; likewise. A descriptor of direct reads cannot read into any other payload than
            whole blocks at whole blocks (EINVAL).
    """
    expected, found = layout.file_bytes, files.size(fd)
    if found != expected:
        raise RefusedError(Refusal.SIZE, f"expected {expected} bytes, found {found}")
    header = memoryview(mmap(-1, HEADER_BYTES))  # a page of memory, for direct reads
    pieces = [header, payload.cast("B")]
    if aligned is None:
        found -= _transfer(pieces, lambda rest, offset: files.read(fd, rest, offset))
    else:
        found = files.read(fd, [aligned], 0)
        header[:], pieces[1][:] = aligned[:HEADER_BYTES], aligned[HEADER_BYTES:expected]
    if found != expected:
        raise RefusedError(Refusal.SIZE, f"expected {expected} bytes, found {found}")
    _check(bytes(header), layout, content, payload)


def _check(header: bytes, layout: PageLayout, content: bytes, payload: memoryview) -> None:
    """Raises: RefusedError, unless header and payload are this page, bit for bit."""
    magic, version, _, _, digest, named, _, _ = _FIELDS.unpack_from(header)
    if magic != MAGIC:
        raise RefusedError(Refusal.MAGIC, f"expected a file that begins with {MAGIC!r}, found {magic!r}")
    if version != VERSION:
        raise RefusedError(Refusal.VERSION, f"expected version {VERSION}, found {version}")
    if digest != layout.digest:
        raise RefusedError(Refusal.LAYOUT, f"expected the layout {layout.digest.hex()}, found {digest.hex()}")
    if named != content:
        raise RefusedError(Refusal.CONTENT, f"expected the page {content.hex()}, found {named.hex()}")
    (written,) = _CHECKSUM.unpack_from(header, _CHECKED)
    if written != (read := _checksum(header[:_CHECKED], payload)):
        raise RefusedError(Refusal.CHECKSUM, f"expected the checksum {written:016x}, found {read:016x}")


def _checksum(checked: bytes, payload: memoryview) -> int:
    total = xxhash.xxh3_64(checked)
    total.update(payload)
    return total.intdigest()


def _transfer(pieces: Sequence[memoryview], call: Callable[[Sequence[memoryview], int], int]) -> int:
    """Read or write all pieces, in as many calls as it takes. Returns the bytes that are missing at the file's end."""
    rest, offset = list(pieces), 0
    while rest and (done := call(rest, offset)):
        offset += done
        while rest and done >= rest[0].nbytes:
            done -= rest.pop(0).nbytes
        if done:
            rest[0] = rest[0][done:]
    return sum(piece.nbytes for piece in rest)
