"""Bearer tokens: one line each, hashed, re-read when the file changes.

A line is `name scopes expires sha256:HEX [rate=600/minute] [calls=16]`. Only hashes are kept. A token has 256
random bits, so one plain SHA-256 hides it: there is nothing to guess that a slow hash would have to protect.
Two lines may share a name: that is how a token is replaced without a gap.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import limits

from deployments.access.files import Watched
from deployments.access.scopes import Scope

log = logging.getLogger("monofacet.access")

PREFIX = "mf_"
# More than the hash of a token would need; a longer header is not worth hashing.
MAX_TOKEN_LENGTH = 512
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class TokensInvalid(ValueError):
    """A line of the tokens cannot be read; the message names the line and never quotes a secret."""


class UnknownToken(Exception):
    """No line holds this token's hash."""


class ExpiredToken(Exception):
    """The token's time has passed."""


@dataclass(frozen=True, slots=True)
class Token:
    """What one line grants.

    Attributes
    ----------
    name
        Of its holder; limits and logs go by it.
    scopes
        What it may do.
    expires
        When it ends; None for never.
    digest
        SHA-256 of the token, 32 bytes.
    rate, calls
        Its own limits, where they differ from the settings'.
    """

    name: str
    scopes: frozenset[Scope]
    expires: datetime | None
    digest: bytes
    rate: limits.RateLimitItem | None = None
    calls: int | None = None


def digest_of(token: str) -> bytes:
    """Return the SHA-256 of a token."""
    return hashlib.sha256(token.encode()).digest()


def new_token(name: str, scopes: frozenset[Scope], expires: datetime | None) -> tuple[str, str]:
    """Make a token of 256 random bits.

    Returns
    -------
    The token, to be shown once, and the line that admits it.
    """
    token = PREFIX + secrets.token_urlsafe(32)
    until = "never" if expires is None else expires.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    words = ",".join(sorted(scopes))
    return token, f"{name} {words} {until} sha256:{digest_of(token).hex()}"


def parse_tokens(text: str) -> tuple[Token, ...]:
    """Read lines of tokens; empty lines and those that start with `#` say nothing.

    Raises
    ------
    TokensInvalid
        Naming the first line at fault.
    """
    tokens: dict[bytes, Token] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        try:
            token = _parse_line(words)
        except ValueError as error:
            raise TokensInvalid(f"line {number}: {error}") from None
        if token.digest in tokens:
            raise TokensInvalid(f"line {number}: the same token stands on an earlier line")
        tokens[token.digest] = token
    return tuple(tokens.values())


def _parse_line(words: list[str]) -> Token:
    if len(words) < 4:
        raise ValueError("expected `name scopes expires sha256:HEX`")
    name, scopes, expires, digest, *options = words
    if not _NAME.fullmatch(name):
        raise ValueError("a name has letters, digits, `.`, `_` and `-`, at most 64")
    if not re.fullmatch(r"sha256:[0-9a-fA-F]{64}", digest):
        # Whatever stands there might be a token itself, so it is not repeated.
        raise ValueError("the fourth word must be `sha256:` and 64 hexadecimal digits")
    given = dict(option.partition("=")[::2] for option in options)
    if set(given) - {"rate", "calls"}:
        raise ValueError("options are rate=600/minute and calls=16")
    calls = int(given["calls"]) if "calls" in given else None
    if calls is not None and calls < 1:
        raise ValueError("calls is at least 1")
    return Token(
        name,
        parse_scopes(scopes),
        parse_expiry(expires),
        bytes.fromhex(digest.removeprefix("sha256:")),
        limits.parse(given["rate"]) if "rate" in given else None,
        calls,
    )


def parse_scopes(text: str) -> frozenset[Scope]:
    """Read `read,generate`; raise ValueError with the scopes that there are."""
    known = {scope.value for scope in Scope}
    words = text.split(",")
    if not set(words) <= known:
        raise ValueError(f"scopes are {', '.join(sorted(known))}, joined by commas")
    return frozenset(map(Scope, words))


def parse_expiry(text: str) -> datetime | None:
    """Read `never`, a date (its first moment, UTC) or an ISO 8601 time (UTC unless it says otherwise)."""
    if text == "never":
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError("expires is `never`, 2027-01-31 or 2027-01-31T12:00:00Z") from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


class TokenStore:
    """The tokens in force.

    Parameters
    ----------
    file
        Re-read when it changes; a broken or vanished file leaves the former tokens in force.
    inline
        More lines, joined by newlines or `;`, as an environment variable carries them.
    now
        The time, for tests.

    Raises
    ------
    TokensInvalid
        When a line cannot be read at the start.
    OSError
        When the file cannot be read at the start.
    """

    def __init__(self, file: Path | None, inline: str = "", now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._inline = parse_tokens(inline.replace(";", "\n"))
        self._file = None if file is None else Watched([file])
        self._from_file: tuple[Token, ...] = ()
        if self._file is not None:
            self._from_file = parse_tokens(self._file.read()[0].decode())

    @property
    def tokens(self) -> tuple[Token, ...]:
        """Every token in force, expired ones too."""
        if self._file is not None and self._file.changed():
            try:
                self._from_file = parse_tokens(self._file.read()[0].decode())
            except (OSError, ValueError) as error:
                log.error("the tokens file cannot be read (%s); the former tokens stay in force", _why(error))
            else:
                log.info("the tokens file was read again: %d tokens", len(self._from_file))
        return self._inline + self._from_file

    def find(self, presented: str) -> Token:
        """Return the token that a caller presents.

        Every stored hash is compared, each in constant time, so that the time tells nothing about which
        were close or where in the file they stand.

        Raises
        ------
        UnknownToken, ExpiredToken
            As it says.
        """
        return self._in_force(digest_of(presented[: MAX_TOKEN_LENGTH + 1]))

    def renewed(self, token: Token) -> Token:
        """Return what the line of a token says now.

        Raises
        ------
        UnknownToken, ExpiredToken
            When it has been removed since, or its time has passed.
        """
        return self._in_force(token.digest)

    def _in_force(self, digest: bytes) -> Token:
        found = None
        for token in self.tokens:
            if hmac.compare_digest(token.digest, digest):
                found = token
        if found is None:
            raise UnknownToken
        if found.expires is not None and found.expires.timestamp() <= self._now():
            raise ExpiredToken
        return found


def _why(error: Exception) -> str:
    return error.strerror or "unreadable" if isinstance(error, OSError) else str(error)
