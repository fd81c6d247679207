"""A mutual TLS client based on Python's ssl, which keeps its connections open. Arguments: the port, how many
connections, the files of a root, a certificate and a key, and paths. Each connection requests each path in turn;
after all responses it prints "they wait", and keeps the connections until it is terminated."""
import http.client
import signal
import ssl
import sys

SECONDS = 25

port, count, root, certificate, key, *paths = sys.argv[1:]
context = ssl.create_default_context(cafile=root)
context.check_hostname = False
context.load_cert_chain(certificate, key)
context.set_alpn_protocols(["http/1.1"])

kept = [http.client.HTTPSConnection("127.0.0.1", int(port), timeout=SECONDS, context=context)
        for _ in range(int(count))]
for connection in kept:
    for path in paths:
        connection.request("GET", path)
        answer = connection.getresponse()
        assert answer.status == 200, answer.status
        answer.read()
        assert connection.sock, "it was not kept"
print("they wait", flush=True)
signal.pause()
