"""What can be known to be wrong with access before anything is started."""

from __future__ import annotations

from collections.abc import Callable

from deployments.access.tls import ServerCertificate
from deployments.access.tokens import TokensInvalid, TokenStore
from deployments.operations.settings import Settings


class AccessInvalid(ValueError):
    """Certificates or tokens cannot be used; the message is one line that names the setting."""


def open_tokens(settings: Settings) -> TokenStore | None:
    """Return the tokens that the settings name; None where there are none, which leaves the door open.

    Raises
    ------
    AccessInvalid
        When they cannot be read.
    """
    if settings.tokens_file is None and not settings.tokens.strip():
        return None
    try:
        return TokenStore(settings.tokens_file, settings.tokens)
    except TokensInvalid as error:
        raise AccessInvalid(f"tokens: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise AccessInvalid(f"tokens_file: {settings.tokens_file}: {why}") from None


def open_certificate(
    settings: Settings,
    observe: Callable[[float], None] = lambda _: None,
    refused: Callable[[], None] = lambda: None,
) -> ServerCertificate | None:
    """Return the certificate that the settings name; None for plain text.

    Parameters
    ----------
    settings
        Of the server.
    observe, refused
        As `ServerCertificate`'s.

    Raises
    ------
    AccessInvalid
        When it cannot be used.
    """
    if settings.tls_certificate is None or settings.tls_key is None:
        return None
    try:
        return ServerCertificate(
            settings.tls_certificate, settings.tls_key, settings.tls_client_ca, observe, refused
        )
    except ValueError as error:
        raise AccessInvalid(f"tls: {error}") from None
