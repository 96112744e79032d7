"""A handshake makes keys for a Link: each end proves to the other that it has the secret, and never sends it.

The leader asks with a nonce; the host answers, and asks with its own. A proof is an HMAC-SHA256 of both nonces, the
host's number and the role of who proves, so one that was overheard, or sent back, proves nothing.
"""

from __future__ import annotations

import hmac
import os
import socket
from typing import NamedTuple, TypeVar

import msgspec

from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.hosts.link import Keys
from nanoflow_backend.hosts.secret import Secret

PROTOCOL = "nanoflow ranks 1"
HANDSHAKE_S = 5.0
NONCE_BYTES, LENGTH_BYTES = 32, 4
MOST_BYTES = 1024  # of a message of somebody who has proven nothing
SHOWN = 200  # characters of theirs

T = TypeVar("T")


class Hello(msgspec.Struct, frozen=True):
    """The leader's first message."""

    protocol: str
    nonce: bytes


class Proof(msgspec.Struct, frozen=True):
    """The host's answer: which host it is, and its proof."""

    protocol: str
    nonce: bytes
    host: int
    proof: bytes


class Answer(msgspec.Struct, frozen=True):
    """The leader's proof; or why the host is refused, and whether it may try `again`."""

    proof: bytes = b""
    refused: str | None = None
    again: bool = False


class Refused(ConfigError):
    """One end does not take the other: the message says which, and why."""


class NotYet(RuntimeError):
    """The leader refuses a host for now."""


class Asked(NamedTuple):
    """A host that has proven to have the secret."""

    host: int
    keys: Keys  # of the leader's end
    proof: bytes  # of the leader


def ask(connection: socket.socket, secret: Secret) -> Asked:
    """The leader's part, which ends with `accept` or `refuse`.

    Raises:
        Refused: another protocol, or no proof. The host has been told.
        OSError, EOFError: the connection is gone, or slow.
    """
    connection.settimeout(HANDSHAKE_S)
    hello = Hello(PROTOCOL, os.urandom(NONCE_BYTES))
    _send(connection, hello)
    proof = _receive(connection, Proof)
    made = _Made(secret, hello.nonce, proof.nonce, proof.host)
    if proof.protocol != PROTOCOL:
        why = f"expected the protocol {PROTOCOL!r}, got {proof.protocol[:SHOWN]!r}: the versions differ"
    elif len(proof.nonce) != NONCE_BYTES or not hmac.compare_digest(proof.proof, made.by_host):
        why = "it has another secret (secret_file)"
    else:
        return Asked(proof.host, Keys(made.to_host, made.to_leader), made.by_leader)
    refuse(connection, why)
    raise Refused(why)


def accept(connection: socket.socket, asked: Asked) -> None:
    """Tell the host that it is taken."""
    _send(connection, Answer(asked.proof))


def refuse(connection: socket.socket, why: str, again: bool = False) -> None:
    """The last word to a host that is not taken."""
    _send(connection, Answer(refused=why, again=again))


def join(connection: socket.socket, secret: Secret, host: int) -> Keys:
    """The host's part: the keys of its end, once the leader has proven that it is one.

    Raises:
        Refused: the leader says so, or has proven nothing.
        NotYet: the leader says that it is worth another try.
        OSError, EOFError: the connection is gone, or slow.
    """
    connection.settimeout(HANDSHAKE_S)
    hello = _receive(connection, Hello)
    if hello.protocol != PROTOCOL or len(hello.nonce) != NONCE_BYTES:
        raise Refused(f"expected the protocol {PROTOCOL!r}, got {hello.protocol[:SHOWN]!r}: the versions differ")
    nonce = os.urandom(NONCE_BYTES)
    made = _Made(secret, hello.nonce, nonce, host)
    _send(connection, Proof(PROTOCOL, nonce, host, made.by_host))
    answer = _receive(connection, Answer)
    if answer.refused is not None:
        raise (NotYet if answer.again else Refused)(f"this host was refused: {answer.refused[:SHOWN]}")
    if not hmac.compare_digest(answer.proof, made.by_leader):
        raise Refused("what answers has another secret (--secret-file)")
    return Keys(made.to_leader, made.to_host)


class _Made:
    """What both ends make of the secret for one conversation."""

    def __init__(self, secret: Secret, leaders_nonce: bytes, hosts_nonce: bytes, host: int) -> None:
        about = (PROTOCOL.encode(), leaders_nonce, hosts_nonce, str(host).encode())
        self.by_host = secret.derive(b"a host proves", *about)
        self.by_leader = secret.derive(b"the leader proves", *about)
        self.to_host = secret.derive(b"key of messages to a host", *about)
        self.to_leader = secret.derive(b"key of messages to the leader", *about)


def _send(connection: socket.socket, message: msgspec.Struct) -> None:
    encoded = msgspec.msgpack.encode(message)
    connection.sendall(len(encoded).to_bytes(LENGTH_BYTES, "big") + encoded)


def _receive(connection: socket.socket, kind: type[T]) -> T:
    """Raises: EOFError, for what is none of our messages too; OSError."""
    length = int.from_bytes(_receive_exactly(connection, LENGTH_BYTES), "big")
    if length > MOST_BYTES:
        raise EOFError(f"expected a message of at most {MOST_BYTES} bytes, got {length}")
    try:
        return msgspec.msgpack.decode(_receive_exactly(connection, length), type=kind)
    except msgspec.DecodeError as error:
        raise EOFError(f"expected a {kind.__name__}: {error}") from None


def _receive_exactly(connection: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size:
        part = connection.recv(size - len(received))
        if not part:
            raise EOFError("the connection was closed")
        received += part
    return received
