"""The server of gRPC's interoperability tests, based on grpcio. Argument: its port.

The methods are specified by grpc/grpc's doc/interop-test-descriptions.md, under "Server"."""
import sys
from concurrent import futures

import grpc
import interop_messages as messages
from interop_messages import encoded, zeros

ECHO_INITIAL = "x-grpc-test-echo-initial"
ECHO_TRAILING = "x-grpc-test-echo-trailing-bin"
STATUSES = {status.value[0]: status for status in grpc.StatusCode}


def echo_metadata(context):
    """Echoes the two metadata entries that the specification names."""
    sent = dict(context.invocation_metadata())
    if ECHO_INITIAL in sent:
        context.send_initial_metadata([(ECHO_INITIAL, sent[ECHO_INITIAL])])
    if ECHO_TRAILING in sent:
        context.set_trailing_metadata([(ECHO_TRAILING, sent[ECHO_TRAILING])])


def echo_status(request, context):
    """Ends the call with the status of the request."""
    if request.HasField("response_status"):
        status = request.response_status
        context.abort(STATUSES[status.code], status.message)


def empty_call(request, context):
    return messages.Empty()


def unary_call(request, context):
    echo_metadata(context)
    echo_status(request, context)
    return messages.SimpleResponse(payload=zeros(request.response_size))


def streaming_input_call(requests, context):
    size = sum(len(request.payload.body) for request in requests)
    return messages.StreamingInputCallResponse(aggregated_payload_size=size)


def streaming_output_call(request, context):
    for parameters in request.response_parameters:
        yield messages.StreamingOutputCallResponse(payload=zeros(parameters.size))


def full_duplex_call(requests, context):
    echo_metadata(context)
    for request in requests:
        echo_status(request, context)
        yield from streaming_output_call(request, context)


def handler(make, call, request):
    return make(call, getattr(messages, request).FromString, encoded)


# UnimplementedCall is missing on purpose: a case calls it.
HANDLERS = {
    "EmptyCall": handler(grpc.unary_unary_rpc_method_handler, empty_call, "Empty"),
    "UnaryCall": handler(grpc.unary_unary_rpc_method_handler, unary_call, "SimpleRequest"),
    "StreamingInputCall": handler(
        grpc.stream_unary_rpc_method_handler, streaming_input_call, "StreamingInputCallRequest"
    ),
    "StreamingOutputCall": handler(
        grpc.unary_stream_rpc_method_handler, streaming_output_call, "StreamingOutputCallRequest"
    ),
    "FullDuplexCall": handler(
        grpc.stream_stream_rpc_method_handler, full_duplex_call, "StreamingOutputCallRequest"
    ),
}

server = grpc.server(futures.ThreadPoolExecutor(max_workers=16))
server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("grpc.testing.TestService", HANDLERS),))
server.add_insecure_port(f"127.0.0.1:{sys.argv[1]}")
server.start()
print("ready", flush=True)
server.wait_for_termination()
