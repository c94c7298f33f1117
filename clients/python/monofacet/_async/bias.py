"""Calls of BiasService."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Iterable

import grpc

from monofacet import _bias_requests as requests
from monofacet import _types as types
from monofacet._async.core import AsyncCore, Upload, iterate
from monofacet._base import Deadline
from monofacet._inputs import Input
from monofacet._responses import bias as responses
from monofacet._status import error_from_rpc
from monofacet.v1 import bias_service_pb2, bias_service_pb2_grpc


class BiasCalls(AsyncCore):
    """How gendered the towers see people; the calls of `Client`."""

    async def classify_gender(
        self,
        inputs: Input | Iterable[Input],
        *,
        ablation: types.Ablation | None = None,
        truncate: bool = False,
        timeout: float | None = None,
    ) -> types.GenderResult:
        """Tell how gendered each input is, before and after an ablation; see `Client.classify_gender`."""
        stub = self._stub(bias_service_pb2_grpc.BiasServiceStub)
        answers, sizes = await self._in_parts(
            inputs,
            lambda part: self._call(
                stub.ClassifyGender, requests.classify_gender(part, ablation, truncate), timeout
            ),
        )
        return responses.gender(answers, sizes)

    async def audit_gender(
        self,
        items: Iterable[requests.LabelledItem] | AsyncIterable[requests.LabelledItem],
        settings: types.AuditSettings | None = None,
        *,
        timeout: float | None = None,
    ) -> types.AuditResult:
        """Audit what ablations do to labelled inputs of your own; see `Client.audit_gender`.

        The items may be asynchronous.
        """
        deadline = Deadline(self._timeout.stream if timeout is None else timeout)
        first = self._addressed(requests.audit_settings(settings or types.AuditSettings()))

        async def messages() -> AsyncIterator[bias_service_pb2.AuditGenderRequest]:
            yield first
            batcher = requests.ItemBatcher()
            async for item in iterate(items):
                for message in await asyncio.to_thread(batcher.add, item):
                    yield message
            for message in batcher.rest():
                yield message

        upload = Upload(messages())
        stub = self._stub(bias_service_pb2_grpc.BiasServiceStub)
        call = stub.AuditGender(aiter(upload), timeout=deadline.left(), metadata=self._metadata)
        try:
            response = await call
            upload.check()
        except grpc.RpcError as error:
            upload.check()
            raise error_from_rpc(error) from error
        except asyncio.CancelledError:
            upload.check()
            raise
        finally:
            call.cancel()
        return responses.audit(response)
