"""How the gateway calls what computes: handles that repeat a call once when a replica dies, and a bundle's of them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

from ray import exceptions as ray_errors
from ray.serve import exceptions as serve_errors

from deployments.batching import DeadlineExpired
from deployments.encoder.tasks import (
    EncoderFault,
    EncoderInfo,
    EncodeTask,
    ReplicaFaulty,
    Reply,
    ScoreRequest,
)
from deployments.gateway.bundles import Backend
from deployments.gateway.errors import EncoderUnavailable
from deployments.gateway.server import GatewayServer
from deployments.generator.events import Events, GenerateTask, GeneratorInfo
from deployments.operations.served import Served
from services.errors import InvalidInput
from services.modality.tables import ModalityTable

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
# Seconds after which a replica that could not be warmed is asked again what it is.
_WARM_AGAIN_S = 5.0
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
        self._reported = True
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
        once = getattr(self._handle, method)
        (answer,) = [each async for each in self._answers(once, _only, args, remaining_s)]
        return answer

    def stream(self, method: str, *args: Any, remaining_s: float | None = None) -> AsyncGenerator[Any, None]:
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
        return self._answers(getattr(self._handle.options(stream=True), method), aiter, args, remaining_s)

    async def _answers(
        self,
        method: Any,
        messages_of: Callable[[Any], AsyncIterator[Any]],
        args: tuple[Any, ...],
        remaining_s: float | None,
    ) -> AsyncGenerator[Any, None]:
        """Yield what one replica answers; ask another if it has no model, or died before its first answer."""
        began = time.monotonic()
        ends = began + _within(remaining_s)
        deaths = 0
        with self._in_flight():
            while deaths < 2:
                begun = ended = False
                response = method.remote(*args)
                messages = messages_of(response)
                try:
                    while True:
                        # Not around the whole iteration: its body is the caller's.
                        async with asyncio.timeout(ends - time.monotonic()):
                            message = await anext(messages, _END)
                        self._answered = time.monotonic()
                        if message is _END:
                            ended = True
                            return
                        begun = True
                        yield message
                except GONE as error:
                    ended = True
                    deaths += 1
                    log.warning(
                        "no answer from the %s (%s), attempt %d", self._name, type(error).__name__, deaths
                    )
                    self.notice()
                    if begun:
                        break
                except ReplicaFaulty:
                    # It answers at once, so Serve would send it more than the others until it is replaced.
                    ended = True
                    self.notice()
                    if time.monotonic() - began > _LOOK_S:
                        break
                    await asyncio.sleep(max(0.0, min(_LOOK_AGAIN_S, ends - time.monotonic())))
                except TimeoutError:
                    if begun or not self._silent(began):
                        raise DeadlineExpired from None
                    raise EncoderUnavailable("no replica of the model answered in time; try later") from None
                except serve_errors.RequestCancelledError:
                    # Serve's name for the cancellation of this very task.
                    raise asyncio.CancelledError from None
                except Exception:
                    # A replica that raises an error is not silent.
                    ended = True
                    self._answered = time.monotonic()
                    raise
                finally:
                    if not ended:
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
        if self.alive is not self._reported and self._changed is not None:
            self._reported = self.alive
            await self._changed(self.alive)


# What `anext` returns at the end of a stream; no message can be equal to it.
_END = object()


async def _only(response: Any) -> AsyncIterator[Any]:
    """Yield the one answer of a call that answers once."""
    yield await response


def _within(remaining_s: float | None) -> float:
    """Return the seconds that a call to a replica may take."""
    if remaining_s is None:
        return _LONGEST_S
    return max(0.0, remaining_s - min(_MOST_MARGIN_S, _MARGIN * remaining_s))


class BundleModels:
    """The gateway's handles of what computes for one bundle.

    Parameters
    ----------
    server
        Told when replicas are lost and when they are back.
    bundle
        Which one.
    encoder, generator
        Serve's handles; the second is None where no images are generated.
    """

    def __init__(self, server: GatewayServer, bundle: Served, encoder: Any, generator: Any) -> None:
        self._server = server
        self.bundle = bundle

        def handle(deployment: str, of: Any, changed: Callable[[bool, str], Awaitable[None]]) -> ModelHandle:
            lost = server.metrics.replica_restarts.labels(deployment).inc
            made = ModelHandle(deployment, of, lost, lambda alive: changed(alive, bundle.name))
            # Read at each scrape, so that it grows while nothing else moves.
            server.metrics.stalled.labels(deployment).set_function(lambda: made.stalled_s)
            return made

        self._encoder = handle(bundle.encoder, encoder, server.set_serving)
        self._generator = None
        if generator is not None:
            self._generator = handle(bundle.generator, generator, server.set_generating)

    async def encoder_info(self) -> EncoderInfo | EncoderFault:
        """Wait for the encoder to be warm, or to say why it cannot be."""
        info: EncoderInfo | EncoderFault = await self._info(self._encoder)
        return info

    async def _info(self, handle: ModelHandle) -> Any:
        try:
            return await handle.call("info")
        except (EncoderUnavailable, DeadlineExpired) as error:
            return EncoderFault(str(error) or type(error).__name__)

    @property
    def handles(self) -> dict[str, ModelHandle]:
        """What calls the replicas, by deployment."""
        handles = {self.bundle.encoder: self._encoder}
        if self._generator is not None:
            handles[self.bundle.generator] = self._generator
        return handles

    def backend(self, info: EncoderInfo) -> Backend:
        """Return the functions by which the gateway calls them."""
        generate = None if self._generator is None else self._generate
        return Backend(self._encode, self._score, info, generate)

    async def generate_when_warm(self) -> None:
        """Say that images are made once the generator, if there is one, is warm."""
        if self._generator is None:
            return
        info: GeneratorInfo | EncoderFault = await self._info(self._generator)
        while isinstance(info, EncoderFault):
            # Serve replaces such a replica, whose next one may find what this one lacked.
            log.error("not generating: %s: %s", self.bundle.generator, info.why)
            await asyncio.sleep(_WARM_AGAIN_S)
            info = await self._info(self._generator)
        await self._server.generate(info, self.bundle.name)
        log.info("generating")

    async def _encode(self, tasks: list[EncodeTask], remaining_s: list[float | None]) -> Reply:
        # Of the task that may wait longest; each of the others ends with its own call.
        known = [s for s in remaining_s if s is not None]
        longest = max(known) if len(known) == len(remaining_s) else None
        reply: Reply = await self._encoder.call("encode", tasks, remaining_s, remaining_s=longest)
        return reply

    async def _generate(
        self, method: str, task: GenerateTask, remaining_s: float | None
    ) -> AsyncIterator[Events]:
        if self._generator is None:
            raise EncoderUnavailable("no images are made here")
        async with aclosing(
            self._generator.stream(method, task, remaining_s, remaining_s=remaining_s)
        ) as messages:
            async for message in messages:
                yield message

    async def _score(self, request: ScoreRequest) -> ModalityTable:
        answer: ModalityTable | InvalidInput = await self._encoder.call(
            "score", request, remaining_s=request.remaining_s
        )
        if isinstance(answer, InvalidInput):
            raise answer
        return answer
