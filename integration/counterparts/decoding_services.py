"""Services that read a path in different ways, each in a process of its own. Arguments: which one, its port,
and a folder with public files and a folder `admin`. A request that reaches `admin` gets the text `secret`.

files: http.server, which decodes once and resolves dot segments. wsgi: wsgiref, whose PATH_INFO is decoded once,
with slashes merged. twice: decodes twice. servlet: cuts path parameters off each segment, then resolves dots and
merges slashes. raw: compares the path as received."""
import functools
import http.server
import posixpath
import socketserver
import sys
import urllib.parse
import wsgiref.simple_server

which, port, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]


def is_admin(path):
    return path == "/admin" or path.startswith("/admin/")


def decoded(path):
    return urllib.parse.unquote(path, "latin-1")


def resolved(path):
    return posixpath.normpath("/" + path.replace("\\", "/").lstrip("/"))


def reaches(target):
    path = target.split("?")[0]
    if which == "twice":
        return is_admin(resolved(decoded(decoded(path))))
    if which == "servlet":
        bare = "/".join(segment.split(";")[0] for segment in path.split("/"))
        return is_admin(resolved(decoded(bare)))
    return is_admin(path)


class Reading(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Sends head and body in one write.
    wbufsize = -1
    disable_nagle_algorithm = True

    def do_GET(self):
        body = b"secret" if reaches(self.path) else b"public"
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class Files(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Sends head and body in one write.
    wbufsize = -1
    disable_nagle_algorithm = True

    def list_directory(self, path):
        self.send_error(404)

    def log_message(self, *_):
        pass


def application(environ, start):
    path = posixpath.normpath(environ["PATH_INFO"].replace("//", "/"))
    body = b"secret" if is_admin(path) else b"public"
    start("200 OK", [("content-length", str(len(body)))])
    return [body]


class Threading(socketserver.ThreadingMixIn, wsgiref.simple_server.WSGIServer):
    daemon_threads = True


class Quiet(wsgiref.simple_server.WSGIRequestHandler):
    def log_message(self, *_):
        pass


address = ("127.0.0.1", port)
if which == "wsgi":
    server = wsgiref.simple_server.make_server(*address, application, Threading, Quiet)
else:
    handler = functools.partial(Files, directory=folder) if which == "files" else Reading
    server = http.server.ThreadingHTTPServer(address, handler)
print("ready", flush=True)
server.serve_forever()
