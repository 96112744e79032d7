"""What a soak says of descriptors: connections that ended and were not closed are told from all others."""

import os
import socket
import struct

from benchmarks.serving import server_state

RESET_AT_CLOSE = struct.pack("ii", 1, 0)


def test_a_connection_that_has_ended_and_is_still_open_is_a_dead_socket():
    before = server_state.dead_sockets(os.getpid())  # of other tests in this process
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socketpair()[0]:
        client = socket.create_connection(server.getsockname())
        accepted, _ = server.accept()
        with accepted:
            assert server_state.dead_sockets(os.getpid()) == before
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_AT_CLOSE)
            client.close()
            assert server_state.dead_sockets(os.getpid()) == before | {str(os.fstat(accepted.fileno()).st_ino)}
        assert server_state.dead_sockets(os.getpid()) == before
