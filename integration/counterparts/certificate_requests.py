"""Creates certificate requests with Python's `cryptography`.

    certificate_requests.py FOLDER IDENTITY

writes requests for IDENTITY into FOLDER, PEM, one for each unusual or malformed form of a request.
"""

import base64
import pathlib
import sys

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa


def p256():
    return ec.generate_private_key(ec.SECP256R1())


def uri(text):
    return x509.UniformResourceIdentifier(text)


def request(names, key=None, common_name="", extensions=(), digest=None):
    key = key or p256()
    subject = [x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name)] if common_name else []
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(subject))
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    for extension in extensions:
        builder = builder.add_extension(extension, critical=True)
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return builder.sign(key, None)
    return builder.sign(key, digest or hashes.SHA256())


def usage(**set_to):
    fields = (
        "digital_signature content_commitment key_encipherment data_encipherment key_agreement"
        " key_cert_sign crl_sign encipher_only decipher_only"
    ).split()
    return x509.KeyUsage(**{field: set_to.get(field, False) for field in fields})


def armoured(der):
    text = base64.encodebytes(der).decode()
    return f"-----BEGIN CERTIFICATE REQUEST-----\n{text}-----END CERTIFICATE REQUEST-----\n"


def requests(identity):
    own = [uri(identity)]
    authority = x509.BasicConstraints(ca=True, path_length=None)
    yield "p256", request(own)
    yield "p384", request(own, ec.generate_private_key(ec.SECP384R1()), digest=hashes.SHA384())
    yield "ed25519", request(own, ed25519.Ed25519PrivateKey.generate())
    yield "rsa2048", request(own, rsa.generate_private_key(65537, 2048))
    yield "rsa1024", request(own, rsa.generate_private_key(65537, 1024))
    yield "k1", request(own, ec.generate_private_key(ec.SECP256K1()))
    yield "foreign", request([uri("spiffe://other.local/ns/default/sa/web")])
    yield "admin", request([uri(identity.rsplit("/", 1)[0] + "/admin")])
    yield "two-uris", request(own + [uri(identity + "2")])
    yield "twice", request(own + own)
    yield "host-beside", request(own + [x509.DNSName("web.mesh.local")])
    yield "host-only", request([x509.DNSName("web.mesh.local")])
    yield "nameless", request([], common_name=identity)
    yield "upper-case", request([uri(identity.replace("mesh", "MESH"))])
    yield "dots", request([uri(identity + "/../admin")])
    yield "authority", request(own, extensions=[authority])
    yield "signs-certificates", request(own, extensions=[usage(key_cert_sign=True, crl_sign=True)])
    yield "signs-code", request(
        own, extensions=[x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.CODE_SIGNING])]
    )
    yield "common-name", request(own, common_name="admin")


def main(folder, identity):
    for name, made in requests(identity):
        (folder / f"{name}.csr").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    good = request([uri(identity)]).public_bytes(serialization.Encoding.DER)
    (folder / "bad-signature.csr").write_text(armoured(good[:-1] + bytes([good[-1] ^ 1])))
    other = request([uri(identity + "2")]).public_bytes(serialization.Encoding.DER)
    # The same length with another digit: the signature covers another identity.
    changed = other.replace(identity.encode() + b"2", identity.encode() + b"3")
    (folder / "changed-name.csr").write_text(armoured(changed))
    (folder / "cut-off.csr").write_text(armoured(good[:-10]))
    (folder / "large.csr").write_text(armoured(good) + "\n" * (64 * 1024))
    (folder / "garbage.csr").write_text("A" * 1000)
    (folder / "empty.csr").write_text("")


main(pathlib.Path(sys.argv[1]), sys.argv[2])
