"""TLS and mutual TLS whose certificates are read again before the first handshake after they change."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from deployments.access.files import Watched

log = logging.getLogger("monofacet.access")

# gRPC lets a handshake take its certificate without the lock under which `_current` is asked. One that has just left
# that lock is given this long to take the former certificate, before gRPC frees it.
_HAND_OVER_S = 0.25


class CertificateInvalid(ValueError):
    """A certificate, its key or the client authorities cannot be used; the message says which and why.

    Parameters
    ----------
    message
        Why.
    until
        Seconds since the epoch from which they can be used; None where time changes nothing.
    """

    def __init__(self, message: str, until: float | None = None) -> None:
        super().__init__(message)
        self.until = until


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
    refused
        Called for every renewed certificate that cannot be used.
    now
        Seconds since the epoch, for tests.

    Raises
    ------
    CertificateInvalid
        When they cannot be used at the start; an expired one, or one that is not valid yet, cannot.
    """

    def __init__(
        self,
        certificate: Path,
        key: Path,
        client_ca: Path | None = None,
        observe: Callable[[float], None] = lambda _: None,
        refused: Callable[[], None] = lambda: None,
        now: Callable[[], float] = time.time,
    ) -> None:
        paths = [certificate, key, *([client_ca] if client_ca else [])]
        self._files = Watched(paths)
        self._mutual = client_ca is not None
        self._observe = observe
        self._refused = refused
        self._now = now
        # When a renewed certificate, which came before its time, can be used.
        self._again: float | None = None
        self._configuration = self._read()

    def credentials(self) -> grpc.ServerCredentials:
        """Return gRPC's credentials, which ask this object at every handshake.

        gRPC calls back before each handshake, and never twice at once for one port; connections that stand keep theirs.
        They are for one port: the first to ask is told of a change, another would not be.
        """
        return grpc.dynamic_ssl_server_credentials(
            self._configuration, self._current, require_client_authentication=self._mutual
        )

    def _current(self) -> Any:
        """Return the configuration if it is another than before, else None.

        Whatever is returned replaces gRPC's handshaker factory, also by an equal one, and frees the former one. While
        others are in a handshake that ends the process sooner or later, so it is done once a rotation, with care.
        """
        due = self._again is not None and self._now() >= self._again
        if not (self._files.changed() or due):
            return None
        self._again = None
        try:
            self._configuration = self._read()
        except CertificateInvalid as error:
            self._again = error.until
            self._refused()
            log.error("the new certificate cannot be used (%s); the former one stays", error)
            return None
        log.info("the certificate was read again")
        time.sleep(_HAND_OVER_S)
        return self._configuration

    def _read(self) -> Any:
        try:
            certificate, key, *authorities = self._files.read()
        except OSError as error:
            raise CertificateInvalid(f"{error.filename}: {error.strerror}") from None
        ends = check_pair(certificate, key, self._now())
        if authorities:
            _check_authorities(authorities[0])
        self._observe(ends)
        return grpc.ssl_server_certificate_configuration(
            [(key, certificate)], authorities[0] if authorities else None
        )


def check_pair(certificate: bytes, key: bytes, now: float) -> float:
    """Check that a certificate and a key belong together and that the certificate is valid at `now` (s since 1970).

    gRPC would take a pair that does not fit and then fail every handshake; with an expired one its clients would.

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
    begins, ends = leaf.not_valid_before_utc.timestamp(), leaf.not_valid_after_utc.timestamp()
    if now >= ends:
        raise CertificateInvalid(f"the certificate expired at {_utc(ends)}")
    if now < begins:
        raise CertificateInvalid(f"the certificate is not valid before {_utc(begins)}", begins)
    return ends


def _utc(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


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
