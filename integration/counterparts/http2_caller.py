"""An HTTP/2 client based on h2. Arguments: the port, and a file with a JSON list of requests; each has a
connection of its own.

A request has `fields`; `body`, sent at once; `on_continue`, sent after a 100 response; `on_answer`, sent when
the response has begun; `trailers`; `until`, a text in the body after which it disconnects; `tls`, the files of a root,
a certificate and a key. Prints one JSON line per request: the response, as far as it was received."""
import json
import socket
import ssl
import sys

import h2.config
import h2.connection
import h2.events
import h2.exceptions

SECONDS = 25


def dial(port, tls):
    dialled = socket.create_connection(("127.0.0.1", port), SECONDS)
    dialled.settimeout(SECONDS)
    if not tls:
        return dialled
    context = ssl.create_default_context(cafile=tls[0])
    context.check_hostname = False
    context.load_cert_chain(tls[1], tls[2])
    context.set_alpn_protocols(["h2", "http/1.1"])
    secured = context.wrap_socket(dialled)
    assert secured.selected_alpn_protocol() == "h2", secured.selected_alpn_protocol()
    return secured


class Exchange:
    def __init__(self, port, request):
        self.request = request
        self.peer = dial(port, request.get("tls"))
        # Sends invalid headers too: the server must check them.
        config = h2.config.H2Configuration(
            header_encoding="latin-1", validate_outbound_headers=False, normalize_outbound_headers=False)
        self.connection = h2.connection.H2Connection(config)
        self.answer = {"interim": [], "fields": [], "body": "", "trailers": [], "reset": None, "ended": False}

    def send(self, text, last):
        data = text.encode("latin-1")
        while data:
            room = min(self.connection.local_flow_control_window(1), self.connection.max_outbound_frame_size)
            assert room, "the window is full"
            self.connection.send_data(1, data[:room])
            data = data[room:]
        if last and "until" not in self.request:
            if self.request.get("trailers"):
                self.connection.send_headers(1, self.request["trailers"], end_stream=True)
            else:
                self.connection.end_stream(1)

    def waits(self):
        return "on_continue" in self.request or "on_answer" in self.request

    def begin(self):
        self.connection.initiate_connection()
        self.flush()
        if self.request["fields"][0][1] == "CONNECT":
            # The server's SETTINGS say whether it accepts extended CONNECT.
            self.take(h2.events.RemoteSettingsChanged)
        bare = not any(name in self.request for name in ("body", "trailers", "until")) and not self.waits()
        self.connection.send_headers(1, self.request["fields"], end_stream=bare)
        if not bare and not (self.waits() and "body" not in self.request):
            self.send(self.request.get("body", ""), not self.waits())
        self.flush()

    def flush(self):
        self.peer.sendall(self.connection.data_to_send())

    def take(self, awaited=None):
        """Reads until nothing is awaited."""
        while True:
            data = self.peer.recv(65536)
            if not data:
                return
            seen = [self.see(event) for event in self.connection.receive_data(data)]
            self.flush()
            if awaited in seen or self.is_done():
                return

    def see(self, event):
        fields = getattr(event, "headers", None)
        if isinstance(event, h2.events.InformationalResponseReceived):
            self.answer["interim"].append(fields)
            if "on_continue" in self.request and (":status", "100") in fields:
                self.send(self.request["on_continue"], True)
        elif isinstance(event, h2.events.ResponseReceived):
            self.answer["fields"] = fields
            if "on_answer" in self.request:
                self.send(self.request["on_answer"], True)
        elif isinstance(event, h2.events.TrailersReceived):
            self.answer["trailers"] = fields
        elif isinstance(event, h2.events.DataReceived):
            self.answer["body"] += event.data.decode("latin-1")
            self.connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, h2.events.StreamEnded):
            self.answer["ended"] = True
        elif isinstance(event, h2.events.StreamReset):
            self.answer["reset"] = int(event.error_code)
        return type(event)

    def is_done(self):
        until = self.request.get("until")
        return self.answer["ended"] or self.answer["reset"] is not None or (until and until in self.answer["body"])


with open(sys.argv[2]) as file:
    requests = json.load(file)
for request in requests:
    exchange = Exchange(int(sys.argv[1]), request)
    try:
        exchange.begin()
        exchange.take()
    except (OSError, h2.exceptions.ProtocolError) as error:
        exchange.answer["failed"] = repr(error)
    print(json.dumps(exchange.answer), flush=True)
