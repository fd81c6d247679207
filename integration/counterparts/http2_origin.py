"""An HTTP/2 service based on h2, whose behaviour depends on the path, as `integration/src/origin_server.rs` over HTTP/1.1.
Argument: its port. It prints a line for each received request head and body."""
import socket
import sys
import threading

import h2.config
import h2.connection
import h2.events
import h2.settings
from websockets.frames import Opcode
from websockets.protocol import Protocol, Side

LINK = ("link", "</style.css>; rel=preload")


class Stream:
    def __init__(self, fields):
        self.pseudo = {name: value for name, value in fields if name.startswith(":")}
        self.fields = [(name, value) for name, value in fields if not name.startswith(":")]
        self.trailers, self.body, self.talk = [], b"", None

    def described(self):
        """The received request in the form of HTTP/1.1."""
        lines = [f"{self.pseudo[':method']} {self.pseudo.get(':path', '-')}", f"host: {self.pseudo[':authority']}"]
        lines += [f"{name}: {value}" for name, value in self.fields]
        lines += ["", self.body.decode("latin-1")] + [f"trailer {name}: {value}" for name, value in self.trailers]
        return "\n".join(lines)


class Service:
    def __init__(self, peer):
        self.peer = peer
        config = h2.config.H2Configuration(client_side=False, header_encoding="latin-1")
        self.connection = h2.connection.H2Connection(config)
        codes = h2.settings.SettingCodes
        self.connection.local_settings = h2.settings.Settings(
            client=False, initial_values={codes.ENABLE_CONNECT_PROTOCOL: 1, codes.MAX_CONCURRENT_STREAMS: 100})
        self.streams = {}

    def serve(self):
        self.connection.initiate_connection()
        self.flush()
        while data := self.peer.recv(65536):
            for event in self.connection.receive_data(data):
                self.see(event)
            self.flush()

    def flush(self):
        self.peer.sendall(self.connection.data_to_send())

    def see(self, event):
        number = getattr(event, "stream_id", 0)
        if isinstance(event, h2.events.RequestReceived):
            self.streams[number] = Stream(event.headers)
            self.begin(number, self.streams[number])
        elif isinstance(event, h2.events.DataReceived):
            self.connection.acknowledge_received_data(event.flow_controlled_length, number)
            self.more(number, self.streams[number], event.data)
        elif isinstance(event, h2.events.TrailersReceived):
            self.streams[number].trailers = event.headers
        elif isinstance(event, h2.events.StreamEnded):
            self.end(number, self.streams[number])

    def answer(self, number, status, body="", fields=(), trailers=()):
        self.connection.send_headers(number, [(":status", status), *fields], end_stream=not body and not trailers)
        if body:
            self.connection.send_data(number, body.encode("latin-1"), end_stream=not trailers)
        if trailers:
            self.connection.send_headers(number, trailers, end_stream=True)

    def send(self, number, data):
        size = self.connection.max_outbound_frame_size
        for start in range(0, len(data), size):
            self.connection.send_data(number, data[start : start + size])

    def begin(self, number, stream):
        method, path = stream.pseudo[":method"], stream.pseudo.get(":path", "-")
        print("head", method, path, flush=True)
        if method == "CONNECT":
            stream.talk = Protocol(Side.SERVER) if ":protocol" in stream.pseudo else True
            self.connection.send_headers(number, [(":status", "200")])
        elif path.startswith("/refuse/"):
            self.answer(number, path.removeprefix("/refuse/"))
        elif path == "/hints":
            self.connection.send_headers(number, [(":status", "103"), LINK])
        elif ("expect", "100-continue") in stream.fields:
            self.connection.send_headers(number, [(":status", "100")])

    def more(self, number, stream, data):
        if stream.talk is True:
            self.connection.send_data(number, data)
        elif stream.talk:
            stream.talk.receive_data(data)
            for frame in stream.talk.events_received():
                if frame.data == b"bye":
                    stream.talk.send_close(4001, "as you wish")
                elif frame.opcode in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
                    send = {Opcode.TEXT: stream.talk.send_text, Opcode.BINARY: stream.talk.send_binary,
                            Opcode.CONT: stream.talk.send_continuation}[frame.opcode]
                    send(frame.data, frame.fin)
            self.send(number, b"".join(stream.talk.data_to_send()))
        else:
            stream.body += data

    def end(self, number, stream):
        path = stream.pseudo.get(":path", "-")
        print("body", len(stream.body), path, flush=True)
        if stream.talk:
            self.connection.end_stream(number)
        elif path == "/trailers":
            self.answer(number, "200", "body", trailers=[("x-checksum", "1")])
        elif path == "/announced":
            fields = [("content-length", "4"), ("trailer", "x-checksum")]
            self.answer(number, "200", "body", fields, [("x-checksum", "1")])
        elif path == "/length":
            # The response to HEAD has the length of the body that is not sent.
            body = "" if stream.pseudo[":method"] == "HEAD" else "hello\n"
            self.answer(number, "200", body, [("content-length", "6")])
        elif path == "/empty":
            self.answer(number, "204")
        elif path == "/unmodified":
            self.answer(number, "304", fields=[("etag", '"1"')])
        elif path.startswith("/field/"):
            self.answer(number, "200", fields=[("x-long", "x" * int(path.removeprefix("/field/")))])
        elif not path.startswith("/refuse/"):
            body = stream.described()
            self.answer(number, "200", body, [("content-length", str(len(body)))])


def serve(peer):
    try:
        Service(peer).serve()
    except (OSError, h2.exceptions.ProtocolError) as error:
        print("broken", repr(error), flush=True)


listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
print("ready", flush=True)
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
