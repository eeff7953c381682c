"""The fleet's own certificate authority, and the server's certificate under it.

Devices trust only this authority, so nobody can impersonate the server with a certificate of a public authority or with
a stolen domain name.
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedtune.core.errors import InputError

AUTHORITY_DAYS = 3650
SERVER_DAYS = 397
LOOPBACK = ("localhost", "127.0.0.1", "::1")  # addresses through which the server's own processes reach it
_CLOCK_SKEW = datetime.timedelta(hours=1)


@dataclass(frozen=True)
class Certificate:
    """A certificate and its private key in PEM format."""

    certificate: bytes
    key: bytes


def make_authority(days: int = AUTHORITY_DAYS) -> Certificate:
    """Makes a new certificate authority, for server certificates only."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedtune fleet")])
    builder = (
        _dated(days)
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    return Certificate(builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM), _pem(key))


def make_server_certificate(authority: Certificate, hosts: Sequence[str], days: int = SERVER_DAYS) -> Certificate:
    """Makes a certificate for the server, with all names and addresses that devices use for it.

    Args:
        hosts: DNS names and IP addresses; the loopback names are added.

    Raises:
        InputError: a host is neither.
    """
    issuer = x509.load_pem_x509_certificate(authority.certificate)
    issuer_key = load_pem_private_key(authority.key, password=None)
    assert isinstance(issuer_key, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    names = [_general_name(host) for host in dict.fromkeys((*hosts, *LOOPBACK))]
    builder = (
        _dated(days)
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedtune server")]))
        .issuer_name(issuer.subject)
        .public_key(key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()),
            critical=False,
        )
    )
    return Certificate(builder.sign(issuer_key, hashes.SHA256()).public_bytes(Encoding.PEM), _pem(key))


def days_left(certificate: bytes) -> float:
    """Returns the days until a certificate expires; negative after that."""
    end = x509.load_pem_x509_certificate(certificate).not_valid_after_utc
    return (end - datetime.datetime.now(datetime.UTC)) / datetime.timedelta(days=1)


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    labels = host.removeprefix("*.").split(".")
    if len(host) > 253 or not all(
        0 < len(label) < 64 and label.replace("-", "").isalnum() and label.isascii() for label in labels
    ):
        raise InputError(f"{host[:80]!r}: expected a DNS name or an IP address")
    return x509.DNSName(host)


def _dated(days: int) -> x509.CertificateBuilder:
    """Returns a builder with a serial number and dates; a negative number of days gives an expired certificate."""
    now = datetime.datetime.now(datetime.UTC)
    end = now + datetime.timedelta(days=days)
    begin = min(now, end - datetime.timedelta(days=1)) - _CLOCK_SKEW
    return (
        x509.CertificateBuilder()
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
