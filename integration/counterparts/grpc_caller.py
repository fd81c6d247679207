"""A gRPC client based on grpcio, for checks that are not cases of interop_caller.py. Arguments: the port to
call, and the name of the check. Exits 0 when the check passes."""
import queue
import sys

import grpc

channel = grpc.insecure_channel(f"127.0.0.1:{sys.argv[1]}")
LIMIT = 20


def many():
    """Calls in sequence, then concurrently: none fails while connections end."""
    call = channel.unary_unary("/weft.Test/Unary")
    for number in range(40):
        assert call(b"%d" % number, timeout=LIMIT) == b"%d" % number
    under_way = [call.future(b"%d" % number, timeout=LIMIT) for number in range(300)]
    for number, answer in enumerate(under_way):
        assert answer.result() == b"%d" % number


def unary():
    answer, call = channel.unary_unary("/weft.Test/Unary").with_call(b"hello", timeout=LIMIT)
    assert answer == b"hello", answer
    assert ("x-trailer", "behind") in call.trailing_metadata(), call.trailing_metadata()


def error():
    try:
        channel.unary_unary("/weft.Test/Fails")(b"", timeout=LIMIT)
        raise AssertionError("it did not fail")
    except grpc.RpcError as failed:
        assert failed.code() == grpc.StatusCode.FAILED_PRECONDITION, failed
        assert failed.details() == "not today", failed
        trailers = failed.trailing_metadata()
        assert ("x-trailer", "behind") in trailers, failed
        assert ("grpc-status-details-bin", b"\x00\xff details") in trailers, failed


def server_stream():
    answers = list(channel.unary_stream("/weft.Test/ServerStream")(b"1000", timeout=LIMIT))
    assert answers == [b"%d" % number for number in range(1000)]


def client_stream():
    pieces = (b"x" * 1000 for _ in range(500))
    assert channel.stream_unary("/weft.Test/ClientStream")(pieces, timeout=LIMIT) == b"500000"


def cancel():
    call = channel.unary_stream("/weft.Test/Waits")(b"", timeout=LIMIT)
    assert next(call) == b"waiting"
    call.cancel()


def deadline():
    try:
        list(channel.unary_stream("/weft.Test/Waits")(b"", timeout=1))
        raise AssertionError("it outlived its deadline")
    except grpc.RpcError as failed:
        assert failed.code() == grpc.StatusCode.DEADLINE_EXCEEDED, failed


def refused(status, metadata=None):
    try:
        channel.unary_unary("/weft.Test/Unary")(b"", timeout=LIMIT, metadata=metadata)
        raise AssertionError("it was allowed")
    except grpc.RpcError as failed:
        assert failed.code() == status, failed


def denied():
    refused(grpc.StatusCode.PERMISSION_DENIED)


def without_token():
    refused(grpc.StatusCode.UNAUTHENTICATED)


def with_a_bad_token():
    refused(grpc.StatusCode.UNAUTHENTICATED, [("authorization", "Bearer e30.e30.e30")])


def unreachable():
    refused(grpc.StatusCode.UNAVAILABLE)


def cancel_while_sending():
    """The client cancels while the service, which has received a message, waits for more."""
    outbox = queue.Queue()
    call = channel.stream_stream("/weft.Test/Listens")(iter(outbox.get, None), timeout=LIMIT)
    outbox.put(b"first")
    assert next(call) == b"first"
    call.cancel()
    outbox.put(None)


globals()[sys.argv[2]]()
