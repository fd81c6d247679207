"""The messages of gRPC's interoperability tests, limited to the cases of interop_caller.py.

Names and numbers of the fields are those of the public grpc/testing/messages.proto, so that other
implementations are compatible with either end. Defined at run time, so no generated code is needed."""
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

FIELD = descriptor_pb2.FieldDescriptorProto
PACKAGE = "grpc.testing"
# The name, number and type of each field; a type that is a word is another message, "*" is repeated.
MESSAGES = {
    "Empty": [],
    "Payload": [("body", 2, FIELD.TYPE_BYTES)],
    "EchoStatus": [("code", 1, FIELD.TYPE_INT32), ("message", 2, FIELD.TYPE_STRING)],
    "SimpleRequest": [
        ("response_size", 2, FIELD.TYPE_INT32),
        ("payload", 3, "Payload"),
        ("response_status", 7, "EchoStatus"),
    ],
    "SimpleResponse": [("payload", 1, "Payload")],
    "StreamingInputCallRequest": [("payload", 1, "Payload")],
    "StreamingInputCallResponse": [("aggregated_payload_size", 1, FIELD.TYPE_INT32)],
    "ResponseParameters": [("size", 1, FIELD.TYPE_INT32)],
    "StreamingOutputCallRequest": [
        ("response_parameters", 2, "ResponseParameters*"),
        ("payload", 3, "Payload"),
        ("response_status", 7, "EchoStatus"),
    ],
    "StreamingOutputCallResponse": [("payload", 1, "Payload")],
}


def field(name, number, kind):
    made = FIELD(name=name, number=number, label=FIELD.LABEL_OPTIONAL)
    if isinstance(kind, str):
        made.type = FIELD.TYPE_MESSAGE
        made.type_name = f".{PACKAGE}.{kind.rstrip('*')}"
        made.label = FIELD.LABEL_REPEATED if kind.endswith("*") else FIELD.LABEL_OPTIONAL
    else:
        made.type = kind
    return made


def classes():
    file = descriptor_pb2.FileDescriptorProto(name="interop.proto", package=PACKAGE, syntax="proto3")
    for name, fields in MESSAGES.items():
        file.message_type.add(name=name, field=[field(*each) for each in fields])
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    find = pool.FindMessageTypeByName
    return {name: message_factory.GetMessageClass(find(f"{PACKAGE}.{name}")) for name in MESSAGES}


globals().update(classes())


def zeros(size):
    """A payload of zeros."""
    return globals()["Payload"](body=bytes(size))


def encoded(message):
    return message.SerializeToString()
