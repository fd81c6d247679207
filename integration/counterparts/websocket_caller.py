"""A WebSocket client based on websockets. Argument: the port to call. Exits 0 when all messages were echoed."""
import sys

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

with connect(f"ws://127.0.0.1:{sys.argv[1]}/chat", max_size=None) as connection:
    for message in ("hello", b"\x00\xff" * 10, "x" * 1_000_000, b""):
        connection.send(message)
        assert connection.recv(timeout=20) == message
    connection.send("bye")
    try:
        connection.recv(timeout=20)
        raise AssertionError("it was not closed")
    except ConnectionClosed as closed:
        assert (closed.rcvd.code, closed.rcvd.reason) == (4001, "as you wish"), closed
