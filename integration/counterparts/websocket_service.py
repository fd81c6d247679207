"""A WebSocket service based on websockets: echoes every message, and closes after "bye". Argument: its port."""
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
        # The peer violated the protocol, or closed before its message was echoed.
        pass


with serve(echo, "127.0.0.1", int(sys.argv[1]), max_size=None) as server:
    print("ready", flush=True)
    server.serve_forever()
