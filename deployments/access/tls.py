"""TLS and mutual TLS whose certificates are read again before the first handshake after they change."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from deployments.access.files import Watched

log = logging.getLogger("monofacet.access")


class CertificateInvalid(ValueError):
    """A certificate, its key or the client authorities cannot be used; the message says which and why."""


class ServerCertificate:
    """The server's certificate, its key, and whom it trusts to be a client.

    Parameters
    ----------
    certificate, key
        PEM files; the certificate with its chain, leaf first.
    client_ca
        PEM file of authorities; with it every client must show a certificate of theirs.
    observe
        Called with the time at which the certificate ends (seconds since the epoch) whenever one is taken
        into use.

    Raises
    ------
    CertificateInvalid
        When they cannot be used at the start.
    """

    def __init__(
        self,
        certificate: Path,
        key: Path,
        client_ca: Path | None = None,
        observe: Callable[[float], None] = lambda _: None,
    ) -> None:
        paths = [certificate, key, *([client_ca] if client_ca else [])]
        self._files = Watched(paths)
        self._mutual = client_ca is not None
        self._observe = observe
        self._configuration = self._read()

    def credentials(self) -> grpc.ServerCredentials:
        """Return gRPC's credentials, which ask this object at every handshake.

        gRPC calls back in a thread of its own before each handshake; connections that stand keep theirs.
        """
        return grpc.dynamic_ssl_server_credentials(
            self._configuration, self._current, require_client_authentication=self._mutual
        )

    def _current(self) -> Any:
        if self._files.changed():
            try:
                self._configuration = self._read()
            except CertificateInvalid as error:
                log.error("the new certificate cannot be used (%s); the former one stays", error)
            else:
                log.info("the certificate was read again")
        return self._configuration

    def _read(self) -> Any:
        try:
            certificate, key, *authorities = self._files.read()
        except OSError as error:
            raise CertificateInvalid(f"{error.filename}: {error.strerror}") from None
        ends = check_pair(certificate, key)
        if authorities:
            _check_authorities(authorities[0])
        self._observe(ends)
        return grpc.ssl_server_certificate_configuration(
            [(key, certificate)], authorities[0] if authorities else None
        )


def check_pair(certificate: bytes, key: bytes) -> float:
    """Check that a certificate and a key belong together.

    gRPC would take a pair that does not fit and then fail every handshake.

    Returns
    -------
    When the certificate ends, seconds since the epoch.

    Raises
    ------
    CertificateInvalid
        When they do not.
    """
    try:
        leaf = x509.load_pem_x509_certificate(certificate)
    except ValueError:
        raise CertificateInvalid("the certificate is not a PEM certificate") from None
    try:
        private = serialization.load_pem_private_key(key, password=None)
    except (ValueError, TypeError):
        raise CertificateInvalid("the key is not an unencrypted PEM private key") from None
    if _public(private) != _public(leaf):
        raise CertificateInvalid("the key does not belong to the certificate")
    return leaf.not_valid_after_utc.timestamp()


def _public(owner: Any) -> bytes:
    encoded: bytes = owner.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return encoded


def _check_authorities(pem: bytes) -> None:
    try:
        x509.load_pem_x509_certificates(pem)
    except ValueError:
        raise CertificateInvalid("the client authorities are not PEM certificates") from None
