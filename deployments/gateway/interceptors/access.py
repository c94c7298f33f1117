"""The layers that ask who is calling, whether they may, and whether they call too much."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import limits
import limits.storage
import limits.strategies

from deployments.access.scopes import SCOPES, allows
from deployments.access.tokens import ExpiredToken, Token, TokenStore, UnknownToken
from deployments.gateway.errors import ScopeMissing, TokenBusy, TokenMissing, TokenRate
from deployments.gateway.interceptors.chain import Call

_SCHEME = "bearer"


def presented_token(metadata: object) -> str:
    """Return the bearer token of a call's metadata.

    Raises
    ------
    TokenMissing
        When there is none, or something else.
    """
    for key, value in metadata or ():  # type: ignore[attr-defined]
        if key == "authorization" and isinstance(value, str):
            scheme, _, token = value.partition(" ")
            if scheme.lower() == _SCHEME and token.strip():
                return token.strip()
    raise TokenMissing("a token is needed: authorization: Bearer ...")


def check_scope(token: Token, method: str) -> None:
    """Raise ScopeMissing where a token may not call a method."""
    # A method without a row cannot be served at all; should one slip through, nobody may call it.
    needed = SCOPES.get(method)
    if needed is None or not allows(token.scopes, needed):
        raise ScopeMissing(f"this token may not call {method}; it needs scope {needed}")


class Access:
    """Admits by token and scope, for as long as the token is in force.

    Parameters
    ----------
    store
        The tokens; None admits everyone.
    """

    def __init__(self, store: TokenStore | None) -> None:
        self._store = store
        self._calls: dict[Call, asyncio.Timeout] = {}
        self._ended: dict[Call, Exception] = {}

    @asynccontextmanager
    async def layer(self, call: Call) -> AsyncIterator[None]:
        """Admit one call; end it when its token is revoked or expires on the way."""
        if self._store is None:
            yield
            return
        call.token = self._store.find(presented_token(call.context.invocation_metadata()))
        check_scope(call.token, call.method)
        try:
            async with asyncio.timeout(None) as timeout:
                self._calls[call] = timeout
                yield
        except TimeoutError:
            # Others within have time limits, too.
            raise self._ended.get(call) or TimeoutError from None
        finally:
            self._calls.pop(call, None)
            self._ended.pop(call, None)

    def look(self) -> None:
        """End the calls whose token is no longer in force, or may no longer do what they do."""
        if self._store is None:
            return
        now = asyncio.get_running_loop().time()
        for call, timeout in self._calls.items():
            if call.token is None or call in self._ended or timeout.expired():
                continue
            try:
                check_scope(self._store.renewed(call.token), call.method)
            except (UnknownToken, ExpiredToken, ScopeMissing) as error:
                self._ended[call] = error
                timeout.reschedule(now)


class TokenLimits:
    """Bounds what one token may do: calls at once, and calls begun in a span of time.

    Parameters
    ----------
    calls
        Calls in progress of one token, unless its line says otherwise.
    rate
        As `600/minute`, unless its line says otherwise; empty for no limit.
    """

    def __init__(self, calls: int, rate: str) -> None:
        self._calls = calls
        self._rate = limits.parse(rate) if rate else None
        self._in_progress: Counter[str] = Counter()
        # A moving window keeps one time a call. It is exact, so RetryInfo can say when the next call fits.
        self._limiter = limits.strategies.MovingWindowRateLimiter(limits.storage.MemoryStorage())

    @asynccontextmanager
    async def layer(self, call: Call) -> AsyncIterator[None]:
        """Admit one call of a token, or refuse it; callers without tokens share the server's own limits."""
        token = call.token
        if token is None:
            yield
            return
        most = token.calls or self._calls
        if self._in_progress[token.name] >= most:
            raise TokenBusy(f"{most} calls of this token are in progress; try later")
        rate = token.rate or self._rate
        if rate is not None and not self._limiter.hit(rate, token.name):
            raise self._too_often(token, rate)
        self._in_progress[token.name] += 1
        try:
            yield
        finally:
            self._in_progress[token.name] -= 1
            if not self._in_progress[token.name]:
                del self._in_progress[token.name]

    def _too_often(self, token: Token, rate: limits.RateLimitItem) -> TokenRate:
        reset = self._limiter.get_window_stats(rate, token.name).reset_time
        return TokenRate(f"this token may begin {rate}; try later", max(0.001, reset - time.time()))
