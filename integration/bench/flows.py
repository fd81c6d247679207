#!/usr/bin/env python3
"""Holds many TCP flows through an agent, and counts those that are lost.

    integration/in-namespace python3 integration/bench/flows.py --flows 40000 --path proxy

Everything is in the network namespace that `in-namespace` makes: clients and endpoints are processes
with addresses of their own, each of which holds as many flows as its limit of open files allows. Each
flow says a byte and hears it back, is silent for --hold seconds, and does it again.
"""

import argparse
import json
import multiprocessing
import os
import resource
import select
import socket
import subprocess
import sys
import tempfile
import time

SERVICE = ("10.96.0.3", 7000)
CAPTURE, ADMIN, PORT = 15001, 15000, 9000
PER_PROCESS = 9_000


def endpoint(address):
    """Echoes whatever it hears."""
    listener = socket.create_server((address, PORT), backlog=4096)
    listener.setblocking(False)
    poll, open_ones = select.epoll(), {}
    poll.register(listener, select.EPOLLIN)
    while True:
        for number, _ in poll.poll():
            if number == listener.fileno():
                try:
                    while True:
                        stream = listener.accept()[0]
                        open_ones[stream.fileno()] = stream
                        poll.register(stream, select.EPOLLIN)
                except BlockingIOError:
                    continue
            heard = open_ones[number].recv(64)
            if heard:
                open_ones[number].sendall(heard)
            else:
                poll.unregister(number)
                open_ones.pop(number).close()


def client(address, flows, barrier, lost):
    """Opens flows, and tells how many did not answer, at first and in the end."""
    streams = []
    failed = 0
    for _ in range(flows):
        try:
            stream = socket.create_connection(SERVICE, timeout=20, source_address=(address, 0))
            stream.sendall(b"?")
            failed += stream.recv(1) != b"?"
            streams.append(stream)
        except OSError:
            failed += 1
    barrier.wait()
    barrier.wait()
    for stream in streams:
        try:
            stream.sendall(b"!")
            failed += stream.recv(1) != b"!"
        except OSError:
            failed += 1
    lost.put(failed)


def configuration(endpoints):
    def address(ip, port):
        return {"socket_address": {"address": ip, "port_value": port}}

    kind = "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy"
    tcp = {"@type": kind, "stat_prefix": "t", "cluster": "c"}
    members = [{"endpoint": {"address": address(ip, PORT)}} for ip in endpoints]
    return {
        "admin": {"address": address("127.0.0.1", ADMIN)},
        "static_resources": {
            "listeners": [
                {"name": "capture", "address": address("0.0.0.0", CAPTURE), "use_original_dst": True},
                {"name": "service", "address": address(*SERVICE), "bind_to_port": False,
                 "filter_chains": [{"filters": [{"name": "tcp", "typed_config": tcp}]}]},
            ],
            "clusters": [
                {"name": "c", "type": "STATIC", "lb_policy": "MAGLEV", "connect_timeout": "20s",
                 "load_assignment": {"cluster_name": "c", "endpoints": [{"lb_endpoints": members}]}},
            ],
        },
    }


def ready():
    request = b"GET /ready HTTP/1.0\r\n\r\n"
    try:
        with socket.create_connection(("127.0.0.1", ADMIN), timeout=1) as stream:
            stream.sendall(request)
            return b" 200 " in stream.recv(64)
    except OSError:
        return False


def memory_kib(process):
    with open(f"/proc/{process}/status", encoding="ascii") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--weft", default="target/release/weft")
    parser.add_argument("--flows", type=int, required=True)
    parser.add_argument("--path", choices=["kernel", "proxy"], required=True)
    parser.add_argument("--hold", type=float, default=30, help="seconds of silence")
    arguments = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    for words in ["link set lo up", "route add local 10.5.0.0/16 dev lo",
                  "route add local 10.1.0.0/16 dev lo", "route add 10.96.0.0/16 dev lo"]:
        subprocess.run(["ip", *words.split()], check=True)
    parts = -(-arguments.flows // PER_PROCESS)
    addresses = [f"10.1.0.{n + 1}" for n in range(parts + 1)]
    servers = [multiprocessing.Process(target=endpoint, args=(ip,), daemon=True) for ip in addresses]
    for server in servers:
        server.start()

    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(configuration(addresses), file)
        file.flush()
        redirect = ["redirect", "apply", "--outbound", str(CAPTURE), "--services", "10.96.0.0/16"]
        subprocess.run([arguments.weft, *redirect], check=True, stdout=subprocess.DEVNULL)
        # Each worker has a table of open files of its own, so more of them hold more.
        agent = [arguments.weft, "agent", "-c", file.name, "--path", arguments.path,
                 "--workers", str(parts), "--connection-limit", "100000"]
        log = open(os.devnull, "w", encoding="ascii")
        with subprocess.Popen(agent, stdout=log, stderr=log) as agent:
            try:
                while not ready():
                    time.sleep(0.1)
                before = memory_kib(agent.pid)
                barrier, lost = multiprocessing.Barrier(parts + 1), multiprocessing.Queue()
                share = -(-arguments.flows // parts)
                clients = [multiprocessing.Process(target=client, args=(f"10.5.0.{n + 1}", share, barrier, lost))
                           for n in range(parts)]
                started = time.monotonic()
                for one in clients:
                    one.start()
                barrier.wait()
                opened = time.monotonic() - started
                grown = (memory_kib(agent.pid) - before) * 1024 / (share * parts)
                time.sleep(arguments.hold)
                barrier.wait()
                failed = sum(lost.get() for _ in clients)
            finally:
                agent.terminate()
    print(f"{arguments.path}: {share * parts} flows opened in {opened:.1f} s, silent for {arguments.hold:.0f} s, "
          f"{failed} lost; the agent grew by {grown:.0f} bytes a flow")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
