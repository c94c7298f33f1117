"""A deployment's handle that repeats a call once when a replica dies, and knows whether any is left."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ray import exceptions as ray_errors
from ray.serve import exceptions as serve_errors

from deployments.batching import DeadlineExpired
from deployments.encoder.tasks import EncoderFault, ReplicaFaulty
from deployments.gateway.errors import EncoderUnavailable

log = logging.getLogger("monofacet.gateway")

# What a handle raises when no replica could answer, as opposed to an answer that is an error.
GONE = (
    ray_errors.RayActorError,
    ray_errors.ActorUnavailableError,
    ray_errors.NodeDiedError,
    serve_errors.DeploymentUnavailableError,
    serve_errors.BackPressureError,
)
# Seconds in which a living replica says what it is.
_PROBE_S = 2.0
# Seconds between two questions to a deployment whose replicas die, and to one whose replica cannot be warmed.
_AGAIN_S = 0.2
_AGAIN_WHEN_FAULTY_S = 2.0
# Seconds for which a call looks for a replica with a model beside those without, and between two looks.
_LOOK_S = 5.0
_LOOK_AGAIN_S = 0.1
# A call to a replica ends before its caller's deadline, so that the gateway can still say why.
_MARGIN = 0.05
_MOST_MARGIN_S = 0.25
# Seconds without an answer after which a replica may be called silent, and not the call too long for its deadline.
_SILENCE_S = 8.0
# Seconds that a call may take whose caller set no deadline: a stream's chunk, on a slow tower.
_LONGEST_S = 600.0


class ModelHandle:
    """Calls the replicas of one deployment.

    Parameters
    ----------
    name
        Of the deployment, for logs.
    handle
        Serve's handle. Its replicas have a method `info`.
    lost
        Called once for each death that was noticed.
    changed
        Awaited with False when no replica is left or all are hung, and with True when one answers again.
    """

    def __init__(
        self,
        name: str,
        handle: Any,
        lost: Callable[[], None] = lambda: None,
        changed: Callable[[bool], Awaitable[None]] | None = None,
    ) -> None:
        self._name = name
        self._handle = handle
        self._lost = lost
        self._changed = changed
        self._watch: asyncio.Task[None] | None = None
        self._left = True
        self._hung = False
        self._counted = False
        self._told = True
        self._calls: dict[object, float] = {}
        self._answered = time.monotonic()

    @property
    def alive(self) -> bool:
        """Whether a replica is left that is not hung."""
        return self._left and not self._hung

    @property
    def stalled_s(self) -> float:
        """Seconds since anything was answered while something was in flight; 0 while nothing is."""
        # Read by the thread that answers a scrape.
        oldest = min(list(self._calls.values()), default=None)
        return 0.0 if oldest is None else max(0.0, time.monotonic() - max(oldest, self._answered))

    async def call(self, method: str, *args: Any, remaining_s: float | None = None) -> Any:
        """Call one replica; once more if it died, since every call can be repeated unharmed.

        While no replica is left the second try waits for the next one, as long as its caller does.

        Parameters
        ----------
        method, args
            What to call.
        remaining_s
            Seconds until the caller's deadline; None for none. The call ends a little earlier.

        Raises
        ------
        EncoderUnavailable
            When the second replica died as well, none has a model, or none answered anything for long.
        DeadlineExpired
            When there was no time left, though replicas answer, or may do.
        """
        began = time.monotonic()
        try:
            async with asyncio.timeout(_within(remaining_s)):
                with self._in_flight():
                    return await self._call(method, args, began)
        except TimeoutError:
            if self._silent(began):
                raise EncoderUnavailable("no replica of the model answered in time; try later") from None
            raise DeadlineExpired from None

    async def _call(self, method: str, args: tuple[Any, ...], began: float) -> Any:
        deaths = 0
        while True:
            response = getattr(self._handle, method).remote(*args)
            try:
                answer = await response
            except GONE as error:
                deaths += 1
                log.warning(
                    "no answer from the %s (%s), attempt %d", self._name, type(error).__name__, deaths
                )
                self.notice()
                if deaths == 2:
                    break
            except ReplicaFaulty:
                # It answers at once, so Serve would send it more than the others until it is replaced.
                self.notice()
                if time.monotonic() - began > _LOOK_S:
                    break
                await asyncio.sleep(_LOOK_AGAIN_S)
            except asyncio.CancelledError:
                response.cancel()
                raise
            except BaseException:
                # An error is an answer, too.
                self._answered = time.monotonic()
                raise
            else:
                self._answered = time.monotonic()
                return answer
        raise EncoderUnavailable("the model is not available; try later")

    async def stream(self, method: str, *args: Any, remaining_s: float | None = None) -> AsyncIterator[Any]:
        """Call a method of one replica that answers in a stream; once more if it died before its first answer.

        Leaving the iteration cancels the call at the replica.

        Parameters
        ----------
        method, args, remaining_s
            As for `call`.

        Raises
        ------
        EncoderUnavailable
            When the second replica died as well, or the first one on the way, or none answered in time.
        DeadlineExpired
            As `call`.
        """
        began = time.monotonic()
        within = _within(remaining_s)
        with self._in_flight():
            for attempt in (1, 2):
                begun = False
                response = getattr(self._handle.options(stream=True), method).remote(*args)
                messages = aiter(response)
                try:
                    while True:
                        # Not around the whole iteration: its body is the caller's.
                        async with asyncio.timeout(began + within - time.monotonic()):
                            message = await anext(messages, _END)
                        if message is _END:
                            return
                        self._answered = time.monotonic()
                        begun = True
                        yield message
                except GONE as error:
                    log.warning(
                        "no answer from the %s (%s), attempt %d", self._name, type(error).__name__, attempt
                    )
                    self.notice()
                    if begun:
                        break
                except TimeoutError:
                    if begun or not self._silent(began):
                        raise DeadlineExpired from None
                    break
                except serve_errors.RequestCancelledError:
                    # Serve's name for the cancellation of this very task.
                    raise asyncio.CancelledError from None
                finally:
                    response.cancel()
        raise EncoderUnavailable("the model is not available; try later")

    def _silent(self, began: float) -> bool:
        """Return whether a call that began then was given no answer because nobody answers, not for lack of time."""
        silence = time.monotonic() - max(began, self._answered)
        return not self.alive or (self._answered < began and silence >= _SILENCE_S)

    @contextmanager
    def _in_flight(self) -> Iterator[None]:
        key = object()
        self._calls[key] = time.monotonic()
        try:
            yield
        finally:
            del self._calls[key]

    async def set_hung(self, hung: bool) -> None:
        """Say whether every replica is hung, or that one is well again."""
        if hung and not self._hung:
            log.error("every replica of the %s is hung", self._name)
        self._hung = hung
        await self._tell()

    def notice(self, died: bool = True) -> None:
        """Take notice that a replica is gone or has no model; `died` unless it may have been one too many."""
        if self._watch is None or self._watch.done():
            self._counted = False
            self._watch = asyncio.create_task(self._until_back())
        if died:
            self._count()

    def _count(self) -> None:
        # One death fails every call that the replica had; it is counted once.
        if not self._counted:
            self._counted = True
            self._lost()

    async def _until_back(self) -> None:
        """Say whether another replica answers; if none does, say so and wait for the next one."""
        began = asyncio.get_running_loop().time()
        probe = asyncio.create_task(self._probe())
        done, _ = await asyncio.wait([probe], timeout=_PROBE_S)
        if done:
            return
        self._left = False
        self._count()
        log.error("no replica of the %s is left; waiting for the next", self._name)
        await self._tell()
        await probe
        self._left = True
        self._answered = time.monotonic()
        await self._tell()
        log.warning("the %s is back after %.1f s", self._name, asyncio.get_running_loop().time() - began)

    async def _probe(self) -> None:
        said = ""
        while True:
            try:
                answer = await self._handle.info.remote()
            except GONE:
                await asyncio.sleep(_AGAIN_S)
                continue
            except Exception:  # whatever it is, asking must go on, or nobody learns that the next one answers
                log.exception("the %s cannot say what it is", self._name)
                await asyncio.sleep(_AGAIN_WHEN_FAULTY_S)
                continue
            if not isinstance(answer, EncoderFault):
                return
            if answer.why != said:
                said = answer.why
                log.error("the %s cannot be started again: %s", self._name, said)
            await asyncio.sleep(_AGAIN_WHEN_FAULTY_S)

    async def _tell(self) -> None:
        if self.alive is not self._told and self._changed is not None:
            self._told = self.alive
            await self._changed(self.alive)


# What ends a stream of messages, none of which it can be.
_END = object()


def _within(remaining_s: float | None) -> float:
    """Return the seconds that a call to a replica may take."""
    if remaining_s is None:
        return _LONGEST_S
    return max(0.0, remaining_s - min(_MOST_MARGIN_S, _MARGIN * remaining_s))
