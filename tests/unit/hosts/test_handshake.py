"""The handshake: both ends have the secret, or the connection is of no use to either, and nobody learns it."""

import os
import socket
import threading
from pathlib import Path

import pytest
from support.hosts.wire import Wire, connected

from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.hosts import handshake
from nanoflow_backend.hosts.handshake import Answer, Asked, Hello, NotYet, Proof, Refused
from nanoflow_backend.hosts.secret import Secret

TEXT = "5b1a30a1c2b1d9c6b7b0dd5fcb4d6a4f0f1e2d3c4b5a69788796a5b4c3d2e1f0"


def secret(folder: Path, text: str = TEXT, mode: int = 0o600) -> Secret:
    path = folder / f"secret-{len(list(folder.iterdir()))}"
    path.write_text(text)
    path.chmod(mode)
    return Secret(path)


def asked(connection: socket.socket, secret: Secret, results: list) -> None:
    try:
        found = handshake.ask(connection, secret)
        handshake.accept(connection, found)
        results.append(found)
    except (OSError, EOFError, Refused) as error:
        results.append(error)


def meet(leader: Secret, host: Secret, number: int = 1) -> tuple[object, object]:
    """What each end has at the end."""
    one, other = connected()
    results: list[object] = []
    asking = threading.Thread(target=asked, args=(one, leader, results))
    asking.start()
    try:
        joined: object = handshake.join(other, host, number)
    except (OSError, EOFError, Refused, NotYet) as error:
        joined = error
    asking.join()
    one.close()
    other.close()
    return results[0], joined


def test_who_has_the_secret_gets_the_keys_of_the_other_end(tmp_path: Path) -> None:
    leader, host = meet(secret(tmp_path), secret(tmp_path, f"  {TEXT}\n"), number=3)
    assert isinstance(leader, Asked)
    assert leader.host == 3
    assert (leader.keys.send, leader.keys.receive) == (host.receive, host.send)
    assert leader.keys.send != leader.keys.receive
    again, _ = meet(secret(tmp_path), secret(tmp_path), number=3)
    assert again.keys != leader.keys  # of one conversation only


def test_another_secret_is_refused_and_both_ends_say_so(tmp_path: Path) -> None:
    leader, host = meet(secret(tmp_path), secret(tmp_path, TEXT.replace("5", "6")))
    assert isinstance(leader, Refused)
    assert "it has another secret (secret_file)" in str(leader)
    assert isinstance(host, Refused)
    assert "this host was refused: it has another secret (secret_file)" in str(host)


def test_a_leader_that_has_proven_nothing_is_refused(tmp_path: Path) -> None:
    """Also one that sends the host's own proof back."""
    for reflect in (False, True):
        one, other = connected()

        def lead(one: socket.socket = one, reflect: bool = reflect) -> None:
            handshake._send(one, Hello(handshake.PROTOCOL, os.urandom(32)))
            proof = handshake._receive(one, Proof)
            handshake._send(one, Answer(proof.proof if reflect else os.urandom(32)))

        leading = threading.Thread(target=lead)
        leading.start()
        with pytest.raises(Refused, match="what answers has another secret"):
            handshake.join(other, secret(tmp_path), 1)
        leading.join()
        one.close()
        other.close()


def test_a_proof_that_was_overheard_proves_nothing_in_the_next_conversation(tmp_path: Path) -> None:
    one, other = connected()
    heard: list[Proof] = []

    def listen() -> None:
        handshake._send(one, Hello(handshake.PROTOCOL, os.urandom(32)))
        heard.append(handshake._receive(one, Proof))
        one.close()

    listening = threading.Thread(target=listen)
    listening.start()
    with pytest.raises(EOFError):
        handshake.join(other, secret(tmp_path), 1)
    listening.join()
    one, other = connected()
    results: list[object] = []
    asking = threading.Thread(target=asked, args=(one, secret(tmp_path), results))
    asking.start()
    handshake._receive(other, Hello)
    handshake._send(other, heard[0])
    asking.join()
    assert isinstance(results[0], Refused)


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\x05hello", b"", b"\xff\xff\xff\xff"])
def test_strangers_are_refused_with_what_was_expected(tmp_path: Path, said: bytes) -> None:
    one, other = connected()
    other.sendall(said)
    other.shutdown(socket.SHUT_WR)
    with pytest.raises((EOFError, OSError)):
        handshake.ask(one, secret(tmp_path))
    one.close()
    other.close()


def test_a_stranger_that_says_nothing_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshake, "HANDSHAKE_S", 0.1)
    one, other = connected()
    with pytest.raises(TimeoutError):
        handshake.ask(one, secret(tmp_path))
    one.close()
    other.close()


def test_another_protocol_is_named(tmp_path: Path) -> None:
    one, other = connected()
    results: list[object] = []
    asking = threading.Thread(target=asked, args=(one, secret(tmp_path), results))
    asking.start()
    handshake._receive(other, Hello)
    handshake._send(other, Proof("nanoflow ranks 0", b"", 1, b""))
    assert "the versions differ" in str(handshake._receive(other, Answer).refused)
    asking.join()
    assert "expected the protocol 'nanoflow ranks 1', got 'nanoflow ranks 0'" in str(results[0])


def test_the_secret_never_crosses_the_network(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        wire = Wire(listening.getsockname())
        other = socket.create_connection(wire.address)
        one, _ = listening.accept()
    results: list[object] = []
    asking = threading.Thread(target=asked, args=(one, secret(tmp_path), results))
    asking.start()
    keys = handshake.join(other, secret(tmp_path), 1)
    asking.join()
    assert len(wire.carried) > 150
    for hidden in (TEXT.encode(), bytes.fromhex(TEXT), *keys):
        assert hidden not in wire.carried
    one.close()
    other.close()
    wire.close()


@pytest.mark.parametrize(
    ("text", "mode", "complaint"),
    [
        (TEXT, 0o644, "expected a secret that others may not read: chmod o= "),
        (TEXT, 0o602, "expected a secret that others may not read"),
        ("", 0o600, "expected a secret of 32 bytes or more, got 0; make one with: openssl rand -hex 32"),
        ("password" + 99 * "\n", 0o600, "expected a secret of 32 bytes or more, got 8"),
        (9000 * "x", 0o600, "expected at most 4096 bytes, got 9000"),
    ],
)
def test_a_file_that_keeps_no_secret_is_refused(tmp_path: Path, text: str, mode: int, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        secret(tmp_path, text, mode)
    with pytest.raises(ConfigError, match="nowhere: No such file"):
        Secret(tmp_path / "nowhere")


def test_a_group_may_read_it(tmp_path: Path) -> None:
    """Kubernetes gives a mounted secret to a group."""
    secret(tmp_path, TEXT, 0o440)
