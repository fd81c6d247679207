"""The client of gRPC's interoperability tests, based on grpcio. Arguments: the port to call, and the case.

The cases are those of grpc/grpc's doc/interop-test-descriptions.md, by the same names. Exits 0 when all
assertions of the case hold and the connection still works."""
import queue
import sys

import grpc
import interop_messages as messages
from interop_messages import encoded, zeros

channel = grpc.insecure_channel(f"127.0.0.1:{sys.argv[1]}")
LIMIT = 20
REQUEST_SIZES = [27182, 8, 1828, 45904]
RESPONSE_SIZES = [31415, 9, 2653, 58979]
METADATA = [
    ("x-grpc-test-echo-initial", "test_initial_metadata_value"),
    ("x-grpc-test-echo-trailing-bin", b"\xab\xab\xab"),
]


def method(make, name, response, service="grpc.testing.TestService"):
    return make(f"/{service}/{name}", encoded, getattr(messages, response).FromString)


empty_call = method(channel.unary_unary, "EmptyCall", "Empty")
unary_call = method(channel.unary_unary, "UnaryCall", "SimpleResponse")
input_call = method(channel.stream_unary, "StreamingInputCall", "StreamingInputCallResponse")
output_call = method(channel.unary_stream, "StreamingOutputCall", "StreamingOutputCallResponse")
duplex_call = method(channel.stream_stream, "FullDuplexCall", "StreamingOutputCallResponse")


def simple_request():
    return messages.SimpleRequest(response_size=314159, payload=zeros(271828))


def output_request(response_sizes, request_size=0):
    parameters = [messages.ResponseParameters(size=size) for size in response_sizes]
    return messages.StreamingOutputCallRequest(response_parameters=parameters, payload=zeros(request_size))


def check_simple_response(response):
    assert response == messages.SimpleResponse(payload=zeros(314159)), len(response.payload.body)


def check_responses(responses, sizes):
    got = [response.payload.body for response in responses]
    assert got == [bytes(size) for size in sizes], [len(body) for body in got]


def check_status(call, status, details=None):
    """Checks that `call` fails with this status."""
    try:
        call()
        raise AssertionError("it did not fail")
    except grpc.RpcError as failed:
        assert failed.code() == status, failed
        assert details in (None, failed.details()), failed


class Outbox:
    """The requests of a call, sent as the case proceeds."""

    def __init__(self):
        self.requests = queue.Queue()
        self.send = self.requests.put

    def __iter__(self):
        return iter(self.requests.get, None)

    def close(self):
        self.requests.put(None)


def empty_unary():
    assert empty_call(messages.Empty(), timeout=LIMIT) == messages.Empty()


def large_unary():
    check_simple_response(unary_call(simple_request(), timeout=LIMIT))


def concurrent_large_unary():
    """A hundred concurrent calls instead of the described thousand: they finish within seconds."""
    calls = [unary_call.future(simple_request(), timeout=LIMIT) for _ in range(100)]
    for call in calls:
        check_simple_response(call.result())


def client_streaming():
    requests = [messages.StreamingInputCallRequest(payload=zeros(size)) for size in REQUEST_SIZES]
    response = input_call(iter(requests), timeout=LIMIT)
    assert response.aggregated_payload_size == 74922, response


def server_streaming():
    check_responses(output_call(output_request(RESPONSE_SIZES), timeout=LIMIT), RESPONSE_SIZES)


def ping_pong():
    outbox = Outbox()
    responses = duplex_call(iter(outbox), timeout=LIMIT)
    for request_size, response_size in zip(REQUEST_SIZES, RESPONSE_SIZES):
        outbox.send(output_request([response_size], request_size))
        check_responses([next(responses)], [response_size])
    outbox.close()
    check_responses(responses, [])


def empty_stream():
    check_responses(duplex_call(iter([]), timeout=LIMIT), [])


def cancel_after_begin():
    outbox = Outbox()
    call = input_call.future(iter(outbox), timeout=LIMIT)
    call.cancel()
    outbox.close()
    assert call.cancelled()
    assert call.code() == grpc.StatusCode.CANCELLED, call


def cancel_after_first_response():
    outbox = Outbox()
    call = duplex_call(iter(outbox), timeout=LIMIT)
    outbox.send(output_request(RESPONSE_SIZES[:1], REQUEST_SIZES[0]))
    check_responses([next(call)], RESPONSE_SIZES[:1])
    call.cancel()
    check_status(lambda: next(call), grpc.StatusCode.CANCELLED)
    outbox.close()


def timeout_on_sleeping_server():
    outbox = Outbox()
    call = duplex_call(iter(outbox), timeout=0.001)
    outbox.send(output_request([], REQUEST_SIZES[0]))
    check_status(lambda: next(call), grpc.StatusCode.DEADLINE_EXCEEDED)
    outbox.close()


def check_echoed_status(message):
    status = messages.EchoStatus(code=grpc.StatusCode.UNKNOWN.value[0], message=message)
    unary = messages.SimpleRequest(response_status=status)
    check_status(lambda: unary_call(unary, timeout=LIMIT), grpc.StatusCode.UNKNOWN, message)
    duplex = messages.StreamingOutputCallRequest(response_status=status)
    responses = duplex_call(iter([duplex]), timeout=LIMIT)
    check_status(lambda: next(responses), grpc.StatusCode.UNKNOWN, message)


def status_code_and_message():
    check_echoed_status("test status message")


def special_status_message():
    check_echoed_status("\t\ntest with whitespace\r\nand Unicode BMP ☺ and non-BMP 😈\t\n")


def unimplemented_method():
    call = method(channel.unary_unary, "UnimplementedCall", "Empty")
    check_status(lambda: call(messages.Empty(), timeout=LIMIT), grpc.StatusCode.UNIMPLEMENTED)


def unimplemented_service():
    call = method(channel.unary_unary, "UnimplementedCall", "Empty", "grpc.testing.UnimplementedService")
    check_status(lambda: call(messages.Empty(), timeout=LIMIT), grpc.StatusCode.UNIMPLEMENTED)


def check_echoed_metadata(call):
    initial, trailing = METADATA
    assert initial in call.initial_metadata(), call.initial_metadata()
    assert trailing in call.trailing_metadata(), call.trailing_metadata()


def custom_metadata():
    response, call = unary_call.with_call(simple_request(), timeout=LIMIT, metadata=METADATA)
    check_simple_response(response)
    check_echoed_metadata(call)
    request = output_request([314159], 271828)
    call = duplex_call(iter([request]), timeout=LIMIT, metadata=METADATA)
    check_responses(call, [314159])
    check_echoed_metadata(call)


globals()[sys.argv[2]]()
# Some cases end a call early; this checks that the connection still works afterwards.
empty_unary()
