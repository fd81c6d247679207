#!/usr/bin/env python3
"""Writes the bootstrap file of a sidecar with 10,000 services or endpoints: many.py KIND PORT BACKEND_PORT

The kinds and the addresses are those of the benchmark's own drivers: many-clusters has a service of one
endpoint for each host s0.mesh to s9999.mesh, many-endpoints one service of 10,000 endpoints.
"""
import json
import sys

KIND, PORT, BACKEND_PORT = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
COUNT = 10_000
ADDRESSES = [f"10.{88 + i // 65536}.{i // 256 % 256}.{i % 256}" for i in range(1, COUNT + 1)]
HTTP = "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
ROUTER = "envoy.extensions.filters.http.router.v3.Router"


def typed(name, **fields):
    return {"@type": f"type.googleapis.com/{name}", **fields}


def address(ip, port):
    return {"socket_address": {"address": ip, "port_value": port}}


def cluster(name, addresses):
    members = [{"endpoint": {"address": address(ip, BACKEND_PORT)}} for ip in addresses]
    return {"name": name, "type": "STATIC", "connect_timeout": "5s", "lb_policy": "LEAST_REQUEST",
            "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": members}]}}


def host(name, domain, target):
    route = {"match": {"prefix": "/"}, "route": {"cluster": target, "timeout": "15s"}}
    return {"name": name, "domains": [domain], "routes": [route]}


if KIND == "many-clusters":
    clusters = [cluster(f"s{i}", [ip]) for i, ip in enumerate(ADDRESSES)]
    hosts = [host(f"s{i}", f"s{i}.mesh", f"s{i}") for i in range(COUNT)]
else:
    clusters, hosts = [cluster("u", ADDRESSES)], [host("all", "*", "u")]
manager = typed(HTTP, stat_prefix="h", codec_type="AUTO", route_config={"virtual_hosts": hosts},
                http_filters=[{"name": "router", "typed_config": typed(ROUTER)}])
listener = {"name": "l", "address": address("0.0.0.0", PORT),
            "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}]}]}
json.dump({"static_resources": {"listeners": [listener], "clusters": clusters}}, sys.stdout)
