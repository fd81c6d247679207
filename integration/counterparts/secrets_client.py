"""An SDS client based on grpcio and xds-protos: calls each method of the service at a Unix socket.

    secrets_client.py SOCKET

Prints one JSON line per call: its name, and the names of the received secrets, or the status.
"""

import json
import sys

import grpc
from envoy.config.core.v3 import base_pb2
from envoy.extensions.transport_sockets.tls.v3 import secret_pb2
from envoy.service.discovery.v3 import discovery_pb2
from envoy.service.secret.v3 import sds_pb2_grpc

NODE = base_pb2.Node(id="grpcio", cluster="web")
CLUSTERS = "type.googleapis.com/envoy.config.cluster.v3.Cluster"


def names(resources):
    found = []
    for resource in resources:
        secret = secret_pb2.Secret()
        assert resource.Unpack(secret), resource.type_url
        found.append(secret.name)
    return sorted(found)


def report(call, ask):
    try:
        print(json.dumps([call, ask()]), flush=True)
    except grpc.RpcError as error:
        print(json.dumps([call, error.code().name]), flush=True)


def main():
    # The default would be the path of the socket, which is not a valid authority (RFC 3986, section 3.2.2).
    channel = grpc.insecure_channel(f"unix:{sys.argv[1]}", [("grpc.default_authority", "localhost")])
    stub = sds_pb2_grpc.SecretDiscoveryServiceStub(channel)

    def state(wanted, **more):
        return discovery_pb2.DiscoveryRequest(node=NODE, resource_names=wanted, **more)

    def stream(*request):
        return names(next(iter(stub.StreamSecrets(iter(request), timeout=10))).resources)

    def delta():
        request = discovery_pb2.DeltaDiscoveryRequest(node=NODE, resource_names_subscribe=["default", "ROOTCA"])
        answer = next(iter(stub.DeltaSecrets(iter([request]), timeout=10)))
        return names(resource.resource for resource in answer.resources)

    report("stream", lambda: stream(state(["default", "ROOTCA"])))
    report("stream of clusters", lambda: stream(state([], type_url=CLUSTERS)))
    report("delta", delta)
    report("fetch", lambda: names(stub.FetchSecrets(state(["ROOTCA"]), timeout=10).resources))
    report("fetch of nothing", lambda: names(stub.FetchSecrets(state(["nobody"]), timeout=10).resources))
    report("fetch of clusters", lambda: names(stub.FetchSecrets(state([], type_url=CLUSTERS), timeout=10).resources))


main()
