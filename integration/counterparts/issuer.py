"""A token issuer based on Python's `cryptography`.

    issuer.py FOLDER ISSUER AUDIENCE

writes into FOLDER keys.json, a JWKS with one ES256 key; good.token, signed by it and valid for an
hour; and forged.token, with the same claims but signed by another key.
"""

import base64
import json
import pathlib
import sys
import time

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature


def encode(data):
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def token(key, claims):
    header = {"alg": "ES256", "typ": "JWT", "kid": "one"}
    signed = ".".join(encode(json.dumps(part).encode()) for part in (header, claims))
    r, s = decode_dss_signature(key.sign(signed.encode(), ec.ECDSA(hashes.SHA256())))
    return f"{signed}.{encode(r.to_bytes(32) + s.to_bytes(32))}"


folder, issuer, audience = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
key, other = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
claims = {"iss": issuer, "aud": audience, "sub": "visitor", "exp": int(time.time()) + 3600}
point = key.public_key().public_numbers()
jwk = {"kty": "EC", "crv": "P-256", "alg": "ES256", "use": "sig", "kid": "one",
       "x": encode(point.x.to_bytes(32)), "y": encode(point.y.to_bytes(32))}
(folder / "keys.json").write_text(json.dumps({"keys": [jwk]}))
(folder / "good.token").write_text(token(key, claims))
(folder / "forged.token").write_text(token(other, claims))
