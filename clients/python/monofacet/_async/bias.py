"""Calls of BiasService."""

from __future__ import annotations

from collections.abc import AsyncIterable, Iterable

from monofacet import _bias_requests as requests
from monofacet import _types as types
from monofacet._async.models import ModelCalls
from monofacet._inputs import Input
from monofacet._responses import bias as responses
from monofacet.v1 import bias_service_pb2_grpc


class BiasCalls(ModelCalls):
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
        answers, sizes = await self._in_parts(
            inputs,
            self._stub(bias_service_pb2_grpc.BiasServiceStub).ClassifyGender,
            lambda part: requests.classify_gender(part, ablation, truncate),
            timeout,
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
        asked = settings or types.AuditSettings()
        if not asked.ablations:
            asked = requests.with_ablations(asked, (await self.model()).recommended_ablation)
        response = await self._upload(
            self._stub(bias_service_pb2_grpc.BiasServiceStub).AuditGender,
            requests.audit_settings(asked),
            requests.ItemBatcher(),
            items,
            timeout,
        )
        return responses.audit(response)
