"""Concurrent gRPC streams run on one connection, in one thread, at some 20 us a response.

Such a client is not in the way of the server that it measures, though both share the cores: grpcio needs two thread
switches for each response, here a read of the socket brings many. HTTP/2 is spoken only as far as a server that answers
needs it (RFC 9113): headers are sent as literals, those of responses are not read, flow control is opened wide once,
unless it is to be felt.
"""

from __future__ import annotations

import itertools
import select
import socket
import struct
import time
from collections.abc import Iterator
from typing import Self

from tritonclient.grpc.service_pb2 import ModelInferRequest, ModelStreamInferResponse

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
ACK = END_STREAM = 1
END_HEADERS = 4
CANCEL = 8
INITIAL_WINDOW_SIZE, WIDE_OPEN, DEFAULT_WINDOW = 4, 2**31 - 1, 2**16 - 1
READ_BYTES = 1 << 18


class GrpcStreams:
    """Calls of ModelStreamInfer on one connection. A call carries one request after the other until it is closed.

    With `back_pressure`, the server has to wait while 64 KiB of its responses are not read.
    """

    def __init__(self, url: str, back_pressure: bool = False) -> None:
        host, port = url.split(":")
        self._socket = socket.create_connection((host, int(port)))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._unread = b""
        self._partial: dict[int, bytes] = {}  # of a message, by stream that the client has not closed
        self._ids = itertools.count(1, 2)
        settings = struct.pack(">HI", INITIAL_WINDOW_SIZE, WIDE_OPEN)
        window = struct.pack(">I", WIDE_OPEN - DEFAULT_WINDOW)
        self._write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        self._back_pressure = back_pressure
        self._write(frame(SETTINGS, 0, 0, settings))
        if not back_pressure:
            self._write(frame(WINDOW_UPDATE, 0, 0, window))
        self._headers = literals(
            (":method", "POST"),
            (":scheme", "http"),
            (":path", "/inference.GRPCInferenceService/ModelStreamInfer"),
            (":authority", url),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.disconnect()

    def disconnect(self) -> None:
        """Leave, whatever is under way."""
        self._socket.close()

    def fileno(self) -> int:
        """To wait for what `read` then has."""
        return self._socket.fileno()

    def open(self) -> int:
        """A new call; returns its stream."""
        stream = next(self._ids)
        self._partial[stream] = b""
        self._write(frame(HEADERS, END_HEADERS, stream, self._headers))
        return stream

    def send(self, stream: int, request: ModelInferRequest) -> None:
        message = request.SerializeToString()
        self._write(frame(DATA, 0, stream, struct.pack(">BI", 0, len(message)) + message))

    def close(self, stream: int) -> None:
        """No further request on this stream; what is still to come of it is ignored."""
        del self._partial[stream]
        self._write(frame(DATA, END_STREAM, stream, b""))

    def cancel(self, stream: int) -> None:
        """The client does not want the rest."""
        del self._partial[stream]
        self._write(frame(RST_STREAM, 0, stream, struct.pack(">I", CANCEL)))

    def receive(self, until_s: float) -> Iterator[tuple[int, ModelStreamInferResponse]]:
        """(stream, response or error message) as they come, until a moment of `time.monotonic()`; raises as `read`."""
        while (left_s := until_s - time.monotonic()) > 0:
            if select.select([self], [], [], left_s)[0]:
                yield from self.read()

    def read(self) -> list[tuple[int, ModelStreamInferResponse]]:
        """What has come; waits for something.

        Raises:
            ConnectionError: the server ended a stream that the client had not closed, or the connection.
        """
        received = self._socket.recv(READ_BYTES)
        if not received:
            raise ConnectionError("the server closed the connection")
        answers = []
        read_bytes = 0
        for kind, flags, stream, payload in self._frames(received):
            read_bytes += len(payload) if kind == DATA else 0
            if kind == DATA and stream in self._partial:
                answers += [(stream, ModelStreamInferResponse.FromString(m)) for m in self._messages(stream, payload)]
            elif kind in (SETTINGS, PING) and not flags & ACK:
                self._write(frame(kind, ACK, 0, payload if kind == PING else b""))
            elif kind == GOAWAY or (stream in self._partial and (kind == RST_STREAM or flags & END_STREAM)):
                raise ConnectionError(f"the server ended stream {stream}: frame {kind}, {payload!r}")
        if self._back_pressure and read_bytes:
            self._write(frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", read_bytes)))
        return answers

    def _write(self, content: bytes) -> None:
        self._socket.sendall(content)

    def _frames(self, received: bytes) -> Iterator[tuple[int, int, int, bytes]]:
        content, position = self._unread + received, 0
        while len(content) - position >= 9:
            length = int.from_bytes(content[position : position + 3])
            end = position + 9 + length
            if end > len(content):
                break
            kind, flags, stream = struct.unpack_from(">BBI", content, position + 3)
            yield kind, flags, stream, content[position + 9 : end]
            position = end
        self._unread = content[position:]

    def _messages(self, stream: int, payload: bytes) -> Iterator[bytes]:
        content, position = self._partial[stream] + payload, 0
        while len(content) - position >= 5:
            end = position + 5 + int.from_bytes(content[position + 1 : position + 5])
            if end > len(content):
                break
            yield content[position + 5 : end]
            position = end
        self._partial[stream] = content[position:]


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3) + struct.pack(">BBI", kind, flags, stream) + payload


def literals(*headers: tuple[str, str]) -> bytes:
    """HPACK: literal fields without indexing, new names, no Huffman code (RFC 7541, 6.2.2); all below 127 bytes."""
    return b"".join(
        b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode() for name, value in headers
    )
