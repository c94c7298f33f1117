"""TLS of the HTTP port, from the same files as the gRPC port's, read again when they change."""

from __future__ import annotations

import logging
import ssl
import time
from typing import Any

from deployments.access.files import Watched
from deployments.access.tls import CertificateInvalid, check_pair
from deployments.operations.settings import Settings

log = logging.getLogger("monofacet.access")


class TlsContext:
    """Gives every handshake the certificate that is in force.

    `open_certificate` has checked the files of the settings before, and the gRPC port counts renewed ones that cannot
    be used.

    Parameters
    ----------
    settings
        With a certificate and its key.
    """

    def __init__(self, settings: Settings) -> None:
        assert settings.tls_certificate is not None and settings.tls_key is not None
        self._certificate, self._key = settings.tls_certificate, settings.tls_key
        self._client_ca = settings.tls_client_ca
        self._files = Watched(
            [self._certificate, self._key, *([self._client_ca] if self._client_ca is not None else [])]
        )
        # When a renewed certificate, which came before its time, can be used.
        self._again: float | None = None
        self._current = self._read()

    def context(self) -> ssl.SSLContext:
        """Return a context for a listening socket; each handshake on it asks for the current certificate."""
        context = self._read()

        def choose(socket: ssl.SSLObject, name: str | None, _: Any) -> None:
            socket.context = self._in_force()

        context.sni_callback = choose
        return context

    def _in_force(self) -> ssl.SSLContext:
        due = self._again is not None and time.time() >= self._again
        if self._files.changed() or due:
            self._again = None
            try:
                self._current = self._read()
            except (OSError, CertificateInvalid) as error:
                self._again = getattr(error, "until", None)
                log.error("the new certificate cannot be used over HTTP (%s); the former one stays", error)
        return self._current

    def _read(self) -> ssl.SSLContext:
        certificate, key, *_ = self._files.read()
        check_pair(certificate, key, time.time())
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        context.load_cert_chain(self._certificate, self._key)
        if self._client_ca is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(self._client_ca)
        return context
