"""A deployment's handle that repeats a call once when a replica dies, and knows whether any is left."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from ray import exceptions as ray_errors
from ray.serve import exceptions as serve_errors

from deployments.gateway.errors import EncoderUnavailable
from deployments.work import EncoderFault

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
_AGAIN_WHEN_FAULTY_S = 10.0


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
        Awaited with False when no replica is left, and with True when one answers again.
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
        self.alive = True

    async def call(self, method: str, *args: Any) -> Any:
        """Call one replica; once more if it died, since every call can be repeated unharmed.

        While no replica is left the second try waits for the next one, as long as its caller does.

        Raises
        ------
        EncoderUnavailable
            When the second replica died as well.
        """
        for attempt in (1, 2):
            response = getattr(self._handle, method).remote(*args)
            try:
                return await response
            except GONE as error:
                log.warning(
                    "no answer from the %s (%s), attempt %d", self._name, type(error).__name__, attempt
                )
                self._notice()
            except asyncio.CancelledError:
                response.cancel()
                raise
        raise EncoderUnavailable("the model is not available; try later")

    async def stream(self, method: str, *args: Any) -> AsyncIterator[Any]:
        """Call a method of one replica that answers in a stream; once more if it died before its first answer.

        Leaving the iteration cancels the call at the replica.

        Raises
        ------
        EncoderUnavailable
            When the second replica died as well, or the first one on the way.
        """
        for attempt in (1, 2):
            begun = False
            response = getattr(self._handle.options(stream=True), method).remote(*args)
            try:
                async for message in response:
                    begun = True
                    yield message
                return
            except GONE as error:
                log.warning(
                    "no answer from the %s (%s), attempt %d", self._name, type(error).__name__, attempt
                )
                self._notice()
                if begun:
                    break
            except serve_errors.RequestCancelledError:
                # Serve's name for the cancellation of this very task.
                raise asyncio.CancelledError from None
            finally:
                response.cancel()
        raise EncoderUnavailable("the model is not available; try later")

    def _notice(self) -> None:
        # One death fails every call that the replica had; it is counted once.
        if self._watch is None or self._watch.done():
            self._lost()
            self._watch = asyncio.create_task(self._until_back())

    async def _until_back(self) -> None:
        """Say whether another replica answers; if none does, say so and wait for the next one."""
        began = asyncio.get_running_loop().time()
        probe = asyncio.create_task(self._probe())
        done, _ = await asyncio.wait([probe], timeout=_PROBE_S)
        if done:
            return
        self.alive = False
        log.error("no replica of the %s is left; waiting for the next", self._name)
        await self._tell(False)
        await probe
        self.alive = True
        await self._tell(True)
        log.warning("the %s is back after %.1f s", self._name, asyncio.get_running_loop().time() - began)

    async def _probe(self) -> None:
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
            log.error("the %s cannot be started again: %s", self._name, answer.why)
            await asyncio.sleep(_AGAIN_WHEN_FAULTY_S)

    async def _tell(self, alive: bool) -> None:
        if self._changed is not None:
            await self._changed(alive)
