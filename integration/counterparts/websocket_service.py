"""A WebSocket service by websockets: gives every message back, and closes when told "bye". Argument: its port."""
import os
import sys

# The suite of websocket_cases.py sends messages of four million bytes in pieces of 64; read on import.
os.environ["WEBSOCKETS_MAX_FRAGMENTS"] = "100000"

from websockets.exceptions import ConnectionClosed
from websockets.sync.server import serve


def echo(connection):
    try:
        for message in connection:
            if message == "bye":
                connection.close(4001, "as you wish")
                return
            connection.send(message)
    except ConnectionClosed:
        # It was closed by a peer that broke the protocol, or before its message could go back.
        pass


with serve(echo, "127.0.0.1", int(sys.argv[1]), max_size=None) as server:
    print("ready", flush=True)
    server.serve_forever()
