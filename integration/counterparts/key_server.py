"""A JWKS server based on Python's `ssl` and `http.server`.

    key_server.py FOLDER CERTIFICATE KEY VERSION

serves FOLDER/keys.json over TLS of VERSION (1.2, 1.3 or any) at /keys, prints its port, and a line for
each request. /moved redirects to /keys, /elsewhere to /keys at 127.0.0.1, /plain to
/keys without TLS, /loop to itself.
"""

import http.server
import pathlib
import ssl
import sys

folder, certificate, key, version = pathlib.Path(sys.argv[1]), *sys.argv[2:5]


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        port = self.server.server_address[1]
        leads = {
            "/moved": "/keys",
            "/elsewhere": f"https://127.0.0.1:{port}/keys",
            "/plain": f"http://localhost:{port}/keys",
            "/loop": "/loop",
        }
        print("asked", self.headers["host"].split(":")[0], self.path, self.connection.version(), flush=True)
        if self.path in leads:
            self.send_response(302)
            self.send_header("location", leads[self.path])
            self.send_header("content-length", "0")
            self.end_headers()
            return
        keys = (folder / "keys.json").read_bytes()
        self.send_response(200)
        self.send_header("content-length", str(len(keys)))
        self.end_headers()
        self.wfile.write(keys)

    def log_message(self, *_):
        pass


context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(certificate, key)
if version != "any":
    chosen = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}[version]
    context.minimum_version = context.maximum_version = chosen
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
server.socket = context.wrap_socket(server.socket, server_side=True)
print("port", server.server_address[1], flush=True)
server.serve_forever()
