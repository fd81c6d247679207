"""A WebSocket service by websockets: gives every message back, and closes when told "bye". Argument: its port."""
import sys

from websockets.sync.server import serve


def echo(connection):
    for message in connection:
        if message == "bye":
            connection.close(4001, "as you wish")
            return
        connection.send(message)


with serve(echo, "127.0.0.1", int(sys.argv[1]), max_size=None) as server:
    print("ready", flush=True)
    server.serve_forever()
