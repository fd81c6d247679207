"""A gRPC client by grpcio. Arguments: the port to call, and what to check. Exits 0 when it is so."""
import queue
import sys

import grpc

channel = grpc.insecure_channel(f"127.0.0.1:{sys.argv[1]}")
LIMIT = 20


def unary():
    answer, call = channel.unary_unary("/weft.Test/Unary").with_call(b"hello", timeout=LIMIT)
    assert answer == b"hello", answer
    assert ("x-trailer", "behind") in call.trailing_metadata(), call.trailing_metadata()


def large():
    message = b"x" * (1024 * 1024)
    assert channel.unary_unary("/weft.Test/Unary")(message, timeout=LIMIT) == message


def error():
    try:
        channel.unary_unary("/weft.Test/Fails")(b"", timeout=LIMIT)
        raise AssertionError("it did not fail")
    except grpc.RpcError as failed:
        assert failed.code() == grpc.StatusCode.FAILED_PRECONDITION, failed
        assert failed.details() == "not today", failed
        assert ("x-trailer", "behind") in failed.trailing_metadata(), failed


def server_stream():
    answers = list(channel.unary_stream("/weft.Test/ServerStream")(b"1000", timeout=LIMIT))
    assert answers == [b"%d" % number for number in range(1000)]


def client_stream():
    pieces = (b"x" * 1000 for _ in range(500))
    assert channel.stream_unary("/weft.Test/ClientStream")(pieces, timeout=LIMIT) == b"500000"


def both_streams():
    """Each message is answered before the next is sent: nothing is held back on the way."""
    outbox = queue.Queue()
    answers = channel.stream_stream("/weft.Test/BothStreams")(iter(outbox.get, None), timeout=LIMIT)
    for number in range(50):
        outbox.put(b"%d" % number)
        assert next(answers) == b"%d" % number
    outbox.put(None)
    assert list(answers) == []


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


def denied():
    try:
        channel.unary_unary("/weft.Test/Unary")(b"", timeout=LIMIT)
        raise AssertionError("it was allowed")
    except grpc.RpcError as failed:
        assert failed.code() == grpc.StatusCode.PERMISSION_DENIED, failed


globals()[sys.argv[2]]()
