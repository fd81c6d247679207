"""A gRPC service based on grpcio: many messages, trailers, errors and cancellation. Argument: its port.

Messages are plain bytes, so no generated code is needed. It prints a line for each event that a test waits for."""
import sys
import threading
from concurrent import futures

import grpc


def unary(request, context):
    context.set_trailing_metadata((("x-trailer", "behind"),))
    return request


def fails(request, context):
    # Rich errors are binary metadata, which a proxy must not treat as text.
    details = ("grpc-status-details-bin", b"\x00\xff details")
    context.set_trailing_metadata((("x-trailer", "behind"), details))
    context.abort(grpc.StatusCode.FAILED_PRECONDITION, "not today")


def server_stream(request, context):
    for number in range(int(request)):
        yield b"%d" % number


def client_stream(requests, context):
    return b"%d" % sum(len(request) for request in requests)


def given_up(context):
    """An event for the end of a call whose handler has not ended. The line is written at that very
    moment: grpcio never resumes a handler whose call is gone, so the handler itself may not get to
    it."""
    gone = threading.Event()

    def end():
        gone.set()
        print("cancelled", flush=True)

    context.add_callback(end)
    return gone


def waits(request, context):
    """Sends one message, then nothing until the client cancels."""
    gone = given_up(context)
    yield b"waiting"
    if not gone.wait(20):
        print("forgotten", flush=True)


def listens(requests, context):
    """Echoes the first message, then reads until the end of the stream.

    Reading alone cannot tell a caller that gave up from one that has said everything: grpcio ends it
    either way, as its two events happen to arrive. Only the call's own end can."""
    gone = given_up(context)
    yield next(requests)
    try:
        for _ in requests:
            pass
    except grpc.RpcError:
        pass
    if not gone.wait(20):
        print("forgotten", flush=True)


HANDLERS = {
    "Unary": grpc.unary_unary_rpc_method_handler(unary),
    "Fails": grpc.unary_unary_rpc_method_handler(fails),
    "ServerStream": grpc.unary_stream_rpc_method_handler(server_stream),
    "ClientStream": grpc.stream_unary_rpc_method_handler(client_stream),
    "Listens": grpc.stream_stream_rpc_method_handler(listens),
    "Waits": grpc.unary_stream_rpc_method_handler(waits),
}

server = grpc.server(futures.ThreadPoolExecutor(max_workers=16))
server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("weft.Test", HANDLERS),))
server.add_insecure_port(f"127.0.0.1:{sys.argv[1]}")
server.start()
print("ready", flush=True)
server.wait_for_termination()
