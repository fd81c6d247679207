"""An xDS server based on grpcio and xds-protos, with faults that a test can enable.

    ads_server.py PORT FILE

serves the aggregated service on loopback, delta and state of the world, from one JSON file:

    {"fault": null, "clusters": [...], "endpoints": [...], "listeners": [...], "routes": [...]}

in which each resource is in the JSON form of its message. On SIGHUP it reads the file again and sends
what changed. `fault` is one of
    garbage     listeners hold one more, whose bytes are no message
    duplicates  every listener is there twice
    silence     nothing is ever answered

Each event is a JSON line on standard output: ready, a stream, the node with the metadata of its stream, and
the ack or nack of each response."""

import concurrent.futures
import json
import pathlib
import queue
import signal
import sys
import threading

import grpc
from google.protobuf import any_pb2, json_format

from envoy.config.cluster.v3 import cluster_pb2
from envoy.config.endpoint.v3 import endpoint_pb2
from envoy.config.listener.v3 import listener_pb2
from envoy.config.route.v3 import route_pb2

# Imported to register the messages that are packed in an Any.
from envoy.extensions.access_loggers.stream.v3 import stream_pb2  # noqa: F401
from envoy.extensions.filters.http.jwt_authn.v3 import config_pb2  # noqa: F401
from envoy.extensions.filters.http.rbac.v3 import rbac_pb2  # noqa: F401
from envoy.extensions.filters.http.router.v3 import router_pb2  # noqa: F401
from envoy.extensions.filters.network.http_connection_manager.v3 import (  # noqa: F401
    http_connection_manager_pb2,
)
from envoy.extensions.upstreams.http.v3 import http_protocol_options_pb2  # noqa: F401
from envoy.service.discovery.v3 import ads_pb2_grpc, discovery_pb2

PREFIX = "type.googleapis.com/"
KINDS = {
    "clusters": cluster_pb2.Cluster,
    "endpoints": endpoint_pb2.ClusterLoadAssignment,
    "listeners": listener_pb2.Listener,
    "routes": route_pb2.RouteConfiguration,
}
WILDCARDS = ("clusters", "listeners")


def type_url(kind):
    return PREFIX + KINDS[kind].DESCRIPTOR.full_name


KIND_OF = {type_url(kind): kind for kind in KINDS}


def report(**event):
    # One write, because several threads report: print would write the line end separately.
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


class World:
    """The served resources. Streams are notified of changes through their queues."""

    def __init__(self, file):
        self.file = file
        self.lock = threading.Lock()
        self.streams = set()
        self.version = 0
        self.read()

    def read(self):
        content = json.loads(self.file.read_text())
        resources = {}
        for kind, message in KINDS.items():
            resources[kind] = {}
            for fields in content.get(kind, []):
                packed = any_pb2.Any()
                packed.Pack(json_format.ParseDict(fields, message()), deterministic=True)
                resources[kind][fields.get("name") or fields["cluster_name"]] = packed
        with self.lock:
            self.version += 1
            self.fault = content.get("fault")
            if self.fault == "garbage":
                garbage = any_pb2.Any(type_url=type_url("listeners"), value=b"\xff" * 40)
                resources["listeners"]["garbage"] = garbage
            self.resources = resources
            for stream in self.streams:
                stream.put("changed")

    def of(self, kind):
        """The resources of a kind: pairs of a name and an Any."""
        found = list(self.resources[kind].items())
        return found * 2 if self.fault == "duplicates" and kind == "listeners" else found


class Stream:
    """Common part of both variants: one queue of requests and changes, processed in order."""

    def __init__(self, world, requests, context, variant):
        self.world = world
        self.variant = variant
        self.metadata = {item.key: str(item.value) for item in context.invocation_metadata()}
        self.nonce = 0
        self.events = queue.Queue()
        world.streams.add(self.events)
        context.add_callback(self.end)
        threading.Thread(target=self.listen, args=(requests,), daemon=True).start()
        report(event="stream", variant=variant)

    def end(self):
        self.world.streams.discard(self.events)
        self.events.put(None)

    def listen(self, requests):
        try:
            for request in requests:
                if request.HasField("node"):
                    node = json_format.MessageToDict(request.node)
                    report(event="node", node=node, metadata=self.metadata)
                self.events.put(request)
        except grpc.RpcError:
            pass
        self.events.put(None)

    def answers(self):
        while (event := self.events.get()) is not None:
            if event == "changed":
                kinds = list(KINDS)
            else:
                kinds = [KIND_OF[event.type_url]] if event.type_url in KIND_OF else []
                self.judge(event)
                for kind in kinds:
                    self.note(kind, event)
            if self.world.fault == "silence":
                continue
            for kind in kinds:
                response = self.response(kind)
                if response is not None:
                    yield response

    def judge(self, request):
        if not request.response_nonce:
            return
        kind = KIND_OF.get(request.type_url, request.type_url)
        refused = request.HasField("error_detail")
        report(
            event="nack" if refused else "ack",
            kind=kind,
            variant=self.variant,
            nonce=request.response_nonce,
            error=request.error_detail.message if refused else None,
        )

    def next_nonce(self):
        self.nonce += 1
        return str(self.nonce)


class StateStream(Stream):
    """State of the world: every response has all requested resources."""

    def __init__(self, world, requests, context):
        self.wanted = {}
        self.sent = {}
        super().__init__(world, requests, context, "state")

    def note(self, kind, request):
        self.wanted[kind] = set(request.resource_names)

    def response(self, kind):
        names = self.wanted.get(kind)
        if names is None or (not names and kind not in WILDCARDS):
            return None
        chosen = [r for name, r in self.world.of(kind) if not names or name in names]
        state = (frozenset(names), [resource.SerializeToString() for resource in chosen])
        if self.sent.get(kind) == state:
            return None
        self.sent[kind] = state
        return discovery_pb2.DiscoveryResponse(
            version_info=str(self.world.version),
            resources=chosen,
            type_url=type_url(kind),
            nonce=self.next_nonce(),
        )


class DeltaStream(Stream):
    """Delta: a response has only the changes since the last one on this stream."""

    def __init__(self, world, requests, context):
        self.wanted = {}
        self.sent = {}
        self.answered = set()
        super().__init__(world, requests, context, "delta")

    def note(self, kind, request):
        first = kind not in self.wanted
        wanted = self.wanted.setdefault(kind, set())
        sent = self.sent.setdefault(kind, {})
        if first and kind in WILDCARDS and not request.resource_names_subscribe:
            wanted.add("*")
        # Resources that the client has from an earlier stream may be deleted by now.
        if first:
            sent.update(dict.fromkeys(request.initial_resource_versions, b""))
        wanted.update(request.resource_names_subscribe)
        for name in request.resource_names_unsubscribe:
            wanted.discard(name)
            sent.pop(name, None)

    def response(self, kind):
        wanted, sent = self.wanted.get(kind, set()), self.sent.get(kind, {})
        present = {n: r for n, r in self.world.of(kind) if "*" in wanted or n in wanted}
        changed = {n for n, r in present.items() if sent.get(n) != r.SerializeToString()}
        # A requested name that does not exist is reported once, as removed.
        gone = {n for n in sent if n not in present and sent[n] is not None}
        gone |= {n for n in wanted if n != "*" and n not in present and n not in sent}
        # The first response to a wildcard is sent even without resources.
        first = "*" in wanted and kind not in self.answered
        if not changed and not gone and not first:
            return None
        self.answered.add(kind)
        for name in gone:
            sent[name] = None
        for name in changed:
            sent[name] = present[name].SerializeToString()
        return discovery_pb2.DeltaDiscoveryResponse(
            system_version_info=str(self.world.version),
            resources=[
                discovery_pb2.Resource(name=n, version=str(self.world.version), resource=r)
                for n, r in self.world.of(kind)
                if n in changed
            ],
            removed_resources=sorted(gone),
            type_url=type_url(kind),
            nonce=self.next_nonce(),
        )


class Service(ads_pb2_grpc.AggregatedDiscoveryServiceServicer):
    def __init__(self, world):
        self.world = world

    def StreamAggregatedResources(self, requests, context):
        yield from StateStream(self.world, requests, context).answers()

    def DeltaAggregatedResources(self, requests, context):
        yield from DeltaStream(self.world, requests, context).answers()


def main(port, file):
    # Blocked before any thread starts, so that only the loop below receives it.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])
    world = World(pathlib.Path(file))
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(max_workers=8))
    ads_pb2_grpc.add_AggregatedDiscoveryServiceServicer_to_server(Service(world), server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    report(event="ready")
    while True:
        signal.sigwait([signal.SIGHUP])
        world.read()


main(*sys.argv[1:])
