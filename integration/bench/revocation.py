"""What revocation costs: a handshake with lists of many entries, reading them, and ending live connections.

    WEFT=target/release/weft target/venv/bin/python integration/bench/revocation.py [--live 10000]

Prints one line a figure. CPU is the sidecar's own; rounds of each length of list are interleaved.
"""

import argparse
import datetime
import os
import pathlib
import selectors
import socket
import ssl
import statistics
import subprocess
import tempfile
import time

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

NOW = datetime.datetime.now(datetime.timezone.utc)
DAY = datetime.timedelta(days=1)


def tlv(tag, content):
    length = len(content)
    if length < 0x80:
        return bytes([tag, length]) + content
    digits = length.to_bytes((length.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(digits)]) + digits + content


class Authority:
    """A root that signs leaves and lists."""

    def __init__(self, folder):
        self.folder = folder
        self.key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "root")])
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        self.certificate = (
            x509.CertificateBuilder().subject_name(name).issuer_name(name)
            .public_key(self.key.public_key()).serial_number(1)
            .not_valid_before(NOW - DAY).not_valid_after(NOW + DAY)
            .add_extension(x509.BasicConstraints(True, None), True).add_extension(usage, True)
            .sign(self.key, hashes.SHA256()))
        self.write("root.pem", self.certificate.public_bytes(serialization.Encoding.PEM))

    def write(self, name, content):
        new = self.folder / (name + ".new")
        new.write_bytes(content)
        new.rename(self.folder / name)

    def leaf(self, name, serial):
        key = ec.generate_private_key(ec.SECP256R1())
        uri = x509.UniformResourceIdentifier(f"spiffe://mesh.local/ns/default/sa/{name}")
        certificate = (
            x509.CertificateBuilder().subject_name(x509.Name([])).issuer_name(self.certificate.subject)
            .public_key(key.public_key()).serial_number(serial)
            .not_valid_before(NOW - DAY).not_valid_after(NOW + DAY)
            .add_extension(x509.SubjectAlternativeName([uri]), True)
            .sign(self.key, hashes.SHA256()))
        self.write(name + ".pem", certificate.public_bytes(serialization.Encoding.PEM))
        self.write(name + ".key", key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
        os.chmod(self.folder / (name + ".key"), 0o600)

    def crl(self, number, serials):
        """A list, DER. `serials` are encoded integers: libraries take minutes for a million."""
        time_of = lambda at: tlv(0x17, at.strftime("%y%m%d%H%M%SZ").encode())
        date = time_of(NOW - DAY)
        algorithm = bytes.fromhex("300a06082a8648ce3d040302")
        entries = b"".join(tlv(0x30, tlv(0x02, serial) + date) for serial in serials)
        number = tlv(0x30, bytes.fromhex("0603551d14") + tlv(0x04, tlv(0x02, number.to_bytes(4, "big"))))
        body = tlv(0x30, b"".join([
            bytes.fromhex("020101"), algorithm, self.certificate.subject.public_bytes(), date,
            time_of(NOW + DAY), tlv(0x30, entries) if entries else b"", tlv(0xa0, tlv(0x30, number))]))
        signature = self.key.sign(body, ec.ECDSA(hashes.SHA256()))
        return tlv(0x30, body + algorithm + tlv(0x03, b"\0" + signature))


CONFIG = """
admin: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {admin}}}}}}}
static_resources:
  listeners:
  - name: l
    address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}
    filter_chains:
    - filters:
      - name: http
        typed_config:
          '@type': type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: h
          forward_client_cert_details: SANITIZE_SET
          route_config: {{virtual_hosts: [{{name: v, domains: ['*'], routes: [{{match: {{prefix: /}},
            direct_response: {{status: 200, body: {{inline_string: hello}}}}}}]}}]}}
          http_filters: [{{name: r, typed_config: {{'@type': type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}}}]
      transport_socket:
        name: tls
        typed_config:
          '@type': type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
          require_client_certificate: true
          common_tls_context:
            tls_certificates: [{{certificate_chain: {{filename: {folder}/server.pem}}, private_key: {{filename: {folder}/server.key}}}}]
            validation_context:
              trusted_ca: {{filename: {folder}/root.pem}}
              {crl}
            alpn_protocols: [http/1.1]
"""
LISTS = """crl: {{filename: {folder}/{name}}}
              custom_validator_config: {{name: weft.revocation, typed_config: {{'@type': type.googleapis.com/google.protobuf.Struct,
                value: {{entries_limit: 2000000, bytes_limit: 200000000}}}}}}"""


class Sidecar:
    def __init__(self, authority, name, port):
        folder = authority.folder
        crl = LISTS.format(folder=folder, name=name) if name else ""
        self.port, self.admin = port, port + 1
        config = folder / f"{port}.yaml"
        config.write_text(CONFIG.format(port=port, admin=self.admin, folder=folder, crl=crl))
        started = time.monotonic()
        self.process = subprocess.Popen(
            [os.environ["WEFT"], "--log", "error", "sidecar", "-c", config, "--workers", "1"])
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                time.sleep(0.005)
        self.start_seconds = time.monotonic() - started

    def cpu(self):
        tasks = pathlib.Path(f"/proc/{self.process.pid}/task").glob("*/schedstat")
        return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9

    def memory(self):
        with open(f"/proc/{self.process.pid}/smaps_rollup") as rollup:
            return sum(int(l.split()[1]) for l in rollup if l.startswith("Private_")) * 1024

    def end(self):
        self.process.terminate()
        self.process.wait()


def context(folder, name):
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    client.load_cert_chain(folder / f"{name}.pem", folder / f"{name}.key")
    return client


def shake(client, port):
    with client.wrap_socket(socket.create_connection(("127.0.0.1", port))) as tls:
        tls.sendall(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
        answer = tls.recv(4096)
        assert answer.startswith(b"HTTP/1.1 200"), answer


def handshakes(authority, rounds, count):
    lengths = [None, 1_000, 500_000, 1_000_000]
    sidecars = {}
    for at, length in enumerate(lengths):
        name = length and f"crl-{length}"
        if length:
            serials = (b"\x20" + number.to_bytes(15, "big") for number in range(length))
            authority.write(name, authority.crl(1, serials))
        sidecars[length] = Sidecar(authority, name, 21000 + 10 * at)
    plain = sidecars[None]
    for length in lengths[2:]:
        sidecar = sidecars[length]
        time.sleep(1)
        kept = (sidecar.memory() - plain.memory()) / length
        print(f"reading {length} entries: {sidecar.start_seconds - plain.start_seconds:.2f} s until it serves, "
              f"{kept:.1f} B an entry kept")
    client = context(authority.folder, "client")
    cost = {length: [] for length in lengths}
    for _ in range(rounds):
        for length, sidecar in sidecars.items():
            before = sidecar.cpu()
            for _ in range(count):
                shake(client, sidecar.port)
            cost[length].append((sidecar.cpu() - before) / count * 1e6)
    # The machine's speed changes between rounds, so each is compared with its own, and the least with the least.
    for length, each in cost.items():
        ratio = statistics.median(own / none for own, none in zip(each, cost[None]))
        print(f"a handshake with {length or 'no'} entries: {statistics.median(each):.0f} us "
              f"({min(each):.0f} to {max(each):.0f}); of none {ratio:.3f}, the least {min(each) / min(cost[None]):.3f}")
    for sidecar in sidecars.values():
        sidecar.end()


def live(authority, count):
    authority.write("live", authority.crl(1, []))
    sidecar = Sidecar(authority, "live", 22000)
    authority.leaf("leaver", 0x7001)
    held = []
    for name in ("leaver", "client"):
        client = context(authority.folder, name)
        for _ in range(count if name == "leaver" else 50):
            tls = client.wrap_socket(socket.create_connection(("127.0.0.1", sidecar.port)))
            tls.sendall(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
            tls.recv(4096)
            held.append((name, tls))
    waiting = selectors.DefaultSelector()
    leavers = [tls for name, tls in held if name == "leaver"]
    others = [tls for name, tls in held if name == "client"]
    for tls in leavers:
        waiting.register(tls, selectors.EVENT_READ)

    def ask_all():
        took = []
        for tls in others:
            begun = time.monotonic()
            tls.sendall(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
            assert tls.recv(4096).startswith(b"HTTP/1.1 200")
            took.append(time.monotonic() - begun)
        return took

    quiet = sorted(t for _ in range(20) for t in ask_all())
    authority.write("live", authority.crl(2, [b"\x70\x01"]))
    since, left, busy = time.monotonic(), len(leavers), []
    while left and time.monotonic() - since < 30:
        for key, _ in waiting.select(0):
            waiting.unregister(key.fileobj)
            left -= 1
        busy.extend(ask_all())
    took = time.monotonic() - since
    busy.sort()
    p99 = lambda all_of: all_of[len(all_of) * 99 // 100] * 1e3
    print(f"revoking {count} live connections: the last one ended after {took:.2f} s, {left} left; "
          f"others' p99 {p99(busy):.2f} ms, before {p99(quiet):.2f} ms")
    sidecar.end()


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--live", type=int, default=5000)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--count", type=int, default=400)
    wanted = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        authority = Authority(pathlib.Path(folder))
        authority.leaf("server", 0x1001)
        authority.leaf("client", 0x1002)
        handshakes(authority, wanted.rounds, wanted.count)
        live(authority, wanted.live)


if __name__ == "__main__":
    main()
