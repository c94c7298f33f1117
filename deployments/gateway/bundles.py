"""Several bundles behind one server: which are served, what computes for each, and how a call finds its own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from deployments.encoder.tasks import EncoderInfo, ScoreRequest
from deployments.gateway.catalogue import Catalogue
from deployments.gateway.encoder_client import Send
from deployments.gateway.errors import UnknownModel
from deployments.gateway.interceptors.chain import current_call
from services.errors import InvalidInput
from services.modality.tables import ModalityTable

Score = Callable[[ScoreRequest], Awaitable[ModalityTable]]
# Calls a method of the generator that answers in a stream: `deployments.cluster.handles.ModelHandle.stream`.
Stream = Callable[..., AsyncIterator[Any]]

# Of a name that nobody knows, so many characters are repeated to its caller.
_ECHOED = 80


@dataclass(frozen=True, slots=True)
class Backend:
    """What computes for one bundle.

    Attributes
    ----------
    send, score
        Carry work and scores to an encoder.
    info
        What the encoder runs on.
    generate
        Carries calls to a generator; None where no images are made.
    """

    send: Send
    score: Score
    info: EncoderInfo
    generate: Stream | None = None


class Bundles:
    """The bundles of a server, the default first.

    Parameters
    ----------
    catalogues
        At least one; no two of one name.
    """

    def __init__(self, catalogues: Sequence[Catalogue]) -> None:
        self._catalogues = {catalogue.bundle.manifest.name: catalogue for catalogue in catalogues}
        if len(self._catalogues) < len(catalogues):
            raise ValueError("two bundles of one name cannot be told apart")
        self._names = {"": next(iter(self._catalogues))}
        for name, catalogue in self._catalogues.items():
            self._names |= {name: name, catalogue.bundle.id: name}

    def __iter__(self) -> Iterator[str]:
        return iter(self._catalogues)

    def __getitem__(self, name: str) -> Catalogue:
        return self._catalogues[name]

    @property
    def default(self) -> str:
        """Name of the bundle that answers requests which name none."""
        return self._names[""]

    def resolve(self, asked: str) -> str:
        """Return the name of the bundle that a request asks for, by its name or id; empty is the default.

        Raises
        ------
        UnknownModel
            Blaming the field `bundle`.
        """
        if asked in self._names:
            return self._names[asked]
        served = ", ".join(catalogue.bundle.id for catalogue in self._catalogues.values())
        message = f"no bundle {asked[:_ECHOED]!r}; this server serves {served}"
        raise UnknownModel(message, [("bundle", message)])


class Routed:
    """Stands in for the servicers of one service, one a bundle: each call goes to that of its bundle.

    Parameters
    ----------
    service
        Descriptor of the service. Every request of it has a field `bundle`; of a stream the first message counts.
    servicers
        By the bundle's name.
    resolve
        From what a request says to the bundle's name.
    ids
        Of the bundles, by name: told in the log and the metrics of each call.
    """

    def __init__(
        self,
        service: Any,
        servicers: Mapping[str, Any],
        resolve: Callable[[str], str],
        ids: Mapping[str, str] | None = None,
    ) -> None:
        self._ids = ids or {}
        self._servicers = servicers
        self._resolve = resolve
        for method in service.methods:
            setattr(self, method.name, self._routed(method))

    def _routed(self, method: Any) -> Callable[..., Any]:
        def of(bundle: str) -> Callable[..., Any]:
            name = self._resolve(bundle)
            call = current_call.get()
            if call is not None:
                call.bundle = self._ids.get(name, "")
            behaviour: Callable[..., Any] = getattr(self._servicers[name], method.name)
            return behaviour

        async def unary_unary(request: Any, context: Any) -> Any:
            return await of(request.bundle)(request, context)

        async def unary_stream(request: Any, context: Any) -> AsyncIterator[Any]:
            async with aclosing(of(request.bundle)(request, context)) as responses:
                async for response in responses:
                    yield response

        async def stream_unary(requests: AsyncIterator[Any], context: Any) -> Any:
            bundle, messages = await opened(requests)
            return await of(bundle)(messages, context)

        async def stream_stream(requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
            bundle, messages = await opened(requests)
            async with aclosing(of(bundle)(messages, context)) as responses:
                async for response in responses:
                    yield response

        forms = {
            (False, False): unary_unary,
            (False, True): unary_stream,
            (True, False): stream_unary,
            (True, True): stream_stream,
        }
        form: Callable[..., Any] = forms[method.client_streaming, method.server_streaming]
        return form


async def opened(requests: AsyncIterator[Any]) -> tuple[str, AsyncIterator[Any]]:
    """Return what the first message of a stream says of its bundle, and all messages, the first one included.

    The messages raise InvalidInput where a later one names another bundle.
    """
    first = await anext(requests, None)
    bundle = "" if first is None else first.bundle

    async def messages() -> AsyncIterator[Any]:
        if first is None:
            return
        yield first
        async for message in requests:
            if message.bundle not in ("", bundle):
                what = "is for the first message of a stream"
                raise InvalidInput(f"bundle {what}", [("bundle", what)])
            yield message

    return bundle, messages()
