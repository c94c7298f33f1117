# Generated from ../_async/bias.py by tools/sync_side.py: edit that one, and run `make protos`.
"""Calls of BiasService."""

from __future__ import annotations

from collections.abc import Iterable

from monofacet import _bias_requests as requests
from monofacet import _responses as responses
from monofacet import _types as types
from monofacet._convert import read
from monofacet._inputs import Input
from monofacet._sync.models import ModelCalls
from monofacet.v1 import bias_service_pb2_grpc


class BiasCalls(ModelCalls):
    """How gendered the towers see people, and what removing features does about it."""

    def classify_gender(
        self,
        inputs: Input | Iterable[Input],
        *,
        ablation: types.Ablation | None = None,
        truncate: bool = False,
        timeout: float | None = None,
    ) -> types.GenderResult:
        """Tell how gendered each input is, before and after an ablation.

        Parameters
        ----------
        inputs
            As for `encode`; split in the same way.
        ablation
            What to remove. Default nothing; `Model.recommended_ablation` is the bundle's own choice.
        truncate
            Cut texts at the tower's context length instead of refusing them.
        timeout
            Seconds for each call, all its tries included.

        Returns
        -------
        GenderResult
            In the order of the inputs.

        Raises
        ------
        InputError
            If an input or the ablation cannot be sent.
        """
        answers, sizes = self._in_parts(
            inputs,
            self._stub(bias_service_pb2_grpc.BiasServiceStub).ClassifyGender,
            lambda part: requests.classify_gender(part, ablation, truncate),
            timeout,
        )
        return responses.gender(answers, sizes)

    def audit_gender(
        self,
        items: Iterable[requests.LabelledItem],
        settings: types.AuditSettings | None = None,
        *,
        timeout: float | None = None,
    ) -> types.AuditResult:
        """Audit what ablations do to labelled inputs of your own.

        Parameters
        ----------
        items
            Inputs with their labels. They are read as they are sent.
        settings
            Ablations, intervals, null and seed. Default the bundle's own choice of what to remove.
        timeout
            Seconds for the whole call. Default `Timeout.stream`.

        Returns
        -------
        AuditResult
            One audit an ablation, with the settings as used.

        Raises
        ------
        InputError
            If an item cannot be read; the call is ended.
        CallError
            If the call fails. It is not tried again.
        """
        asked = settings or types.AuditSettings()
        if not asked.ablations:
            described = self.model()
            asked = requests.with_ablations(asked, described.recommended_ablation)
        response = self._upload(
            self._stub(bias_service_pb2_grpc.BiasServiceStub).AuditGender,
            requests.audit_settings(asked),
            requests.ItemBatcher(),
            items,
            timeout,
        )
        return read(types.AuditResult, response)
