"""A certificate authority based on Python's `cryptography`.

    authority.py FOLDER TRUST_DOMAIN

writes into FOLDER, all PEM: root.pem; the certificates good, expired and revoked with their keys;
and list.pem, the CRL that revokes the last of them. Unlike `weft ca` it signs any certificate that a
test needs.
"""

import datetime
import pathlib
import sys

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

NOW = datetime.datetime.now(datetime.timezone.utc)
HOUR = datetime.timedelta(hours=1)


def name(text):
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])


def new_key():
    return ec.generate_private_key(ec.SECP256R1())


def usage(**set_to):
    fields = (
        "digital_signature content_commitment key_encipherment data_encipherment key_agreement"
        " key_cert_sign crl_sign encipher_only decipher_only"
    ).split()
    return x509.KeyUsage(**{field: set_to.get(field, False) for field in fields})


def make_root(key, domain):
    return (
        x509.CertificateBuilder()
        .subject_name(name("other hands"))
        .issuer_name(name("other hands"))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - HOUR)
        .not_valid_after(NOW + 24 * HOUR)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"spiffe://{domain}")]),
            critical=False,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def make_leaf(root, root_key, key, identity, ends):
    issuer_id = root.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return (
        x509.CertificateBuilder()
        .subject_name(name(identity))
        .issuer_name(root.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - 2 * HOUR)
        .not_valid_after(ends)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage(digital_signature=True), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage(
                [x509.ExtendedKeyUsageOID.SERVER_AUTH, x509.ExtendedKeyUsageOID.CLIENT_AUTH]
            ),
            critical=False,
        )
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity)]), critical=False
        )
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_id),
            critical=False,
        )
        .sign(root_key, hashes.SHA256())
    )


def make_list(root, root_key, revoked):
    issuer_id = root.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    entry = (
        x509.RevokedCertificateBuilder()
        .serial_number(revoked.serial_number)
        .revocation_date(NOW - HOUR)
        .build()
    )
    return (
        x509.CertificateRevocationListBuilder()
        .issuer_name(root.subject)
        .last_update(NOW - HOUR)
        .next_update(NOW + 24 * HOUR)
        .add_revoked_certificate(entry)
        .add_extension(x509.CRLNumber(1), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_id),
            critical=False,
        )
        .sign(root_key, hashes.SHA256())
    )


def main(folder, domain):
    def write(file, value):
        (folder / file).write_bytes(value)

    def pem(value):
        return value.public_bytes(serialization.Encoding.PEM)

    root_key = new_key()
    root = make_root(root_key, domain)
    write("root.pem", pem(root))
    made = {}
    for which, ends in {"good": HOUR, "expired": -HOUR, "revoked": HOUR}.items():
        key = new_key()
        identity = f"spiffe://{domain}/ns/default/sa/{which}"
        made[which] = make_leaf(root, root_key, key, identity, NOW + ends)
        write(f"{which}.pem", pem(made[which]))
        write(
            f"{which}.key",
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            ),
        )
    write("list.pem", pem(make_list(root, root_key, made["revoked"])))


main(pathlib.Path(sys.argv[1]), sys.argv[2])
