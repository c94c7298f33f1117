"""ModalityService and ModelService through a real gRPC server, against the tiny bundle's own tables."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc import aio
from monofacet.v1 import common_pb2 as common
from monofacet.v1 import modality_service_pb2 as pb
from monofacet.v1 import model_service_pb2

from deployments.access.scopes import Scope
from deployments.access.tokens import new_token
from services.bundle.load import Bundle
from services.modality.label_reasons import label_reason
from tests.deployments.conftest import Open, error_details

CODE = grpc.StatusCode
SETTINGS = pb.ScoreModalityRequest(settings=pb.ScoreSettings(bootstrap_samples=100, shuffles=100))


def batch(*pairs: tuple[bytes, str]) -> pb.ScoreModalityRequest:
    return pb.ScoreModalityRequest(
        batch=pb.PairBatch(
            pairs=[pb.ImageTextPair(image=common.Image(data=data), text=text) for data, text in pairs]
        )
    )


async def test_pages_follow_each_other_and_hold_every_feature_once(open_gateway: Open, tiny: Bundle) -> None:
    async with open_gateway() as gateway:
        request = pb.ListFeaturesRequest(page_size=10, order_by=pb.FEATURE_ORDER_MDS, descending=True)
        cards: list[pb.FeatureCard] = []
        while True:
            page = await gateway.modality.ListFeatures(request)
            cards += page.cards
            if not page.next_page_token:
                break
            request.page_token = page.next_page_token
    table = tiny.modality()
    assert sorted(card.feature for card in cards) == list(range(len(table)))
    assert page.total == len(table)
    mds = [card.mds_energy for card in cards if card.HasField("mds_energy")]
    assert mds == sorted(mds, reverse=True)
    # What is undefined comes last, also in descending order.
    assert [card.HasField("mds_energy") for card in cards] == sorted(
        (card.HasField("mds_energy") for card in cards), reverse=True
    )


async def test_a_card_is_the_tables_row(open_gateway: Open, tiny: Bundle) -> None:
    async with open_gateway() as gateway:
        answer = await gateway.modality.GetFeature(
            pb.GetFeatureRequest(dictionary="ncl", feature=5, max_texts=1)
        )
    row = tiny.modality("ncl").row(5)
    card = answer.card
    assert card.feature == 5
    assert common.ModalityLabel.Name(card.label) == f"MODALITY_LABEL_{row['label']}"
    for name in ("mds_energy", "mds_paper", "coactivation_q", "name_auc", "name_auc_low", "win_rate_text"):
        assert card.HasField(name) != np.isnan(row[name])
        if card.HasField(name):
            assert getattr(card, name) == np.float32(row[name])
    assert card.name == row["name"]
    assert card.name_count == row["name_count"]
    assert card.label_reason == label_reason(row)
    examples = tiny.cards("ncl").top(5, "image", 1000)
    assert [e.sample for e in answer.images] == [e.sample for e in examples]
    assert [e.thumbnail.data for e in answer.images] == [e.thumbnail for e in examples]
    assert len(answer.texts) <= 1


async def test_filters_keep_what_they_say(open_gateway: Open, tiny: Bundle) -> None:
    table = tiny.modality()
    async with open_gateway() as gateway:

        async def features(**conditions: Any) -> list[int]:
            request = pb.ListFeaturesRequest(filter=pb.FeatureFilter(**conditions), page_size=1000)
            return [card.feature for card in (await gateway.modality.ListFeatures(request)).cards]

        by_label = await features(labels=[common.MODALITY_LABEL_TEXT, common.MODALITY_LABEL_CROSS])
        by_mds = await features(min_mds=0.25, max_mds=0.75)
        by_name = await features(name_contains="WORD1")
        significant = await features(coactivation_significant=True)
        rare = await features(max_firing_rate=0.5)
    assert by_label == [j for j in range(len(table)) if table.label[j] in ("TEXT", "CROSS")]
    assert by_mds == [j for j in range(len(table)) if 0.25 <= table.mds_energy[j] <= 0.75]
    assert by_name == [j for j in range(len(table)) if "word1" in table.name[j]]
    assert significant == np.flatnonzero(table.coactivation_significant).tolist()
    assert rare == np.flatnonzero(np.fmax(table.firing_rate_image, table.firing_rate_text) <= 0.5).tolist()


@pytest.mark.parametrize(
    ("method", "request_", "code", "reason", "field"),
    [
        ("ListFeatures", pb.ListFeaturesRequest(dictionary="x"), CODE.NOT_FOUND, "UNKNOWN_DICTIONARY", "dictionary"),
        ("ListFeatures", pb.ListFeaturesRequest(page_size=1001), CODE.INVALID_ARGUMENT, "INVALID_INPUT", "page_size"),
        (
            "ListFeatures", pb.ListFeaturesRequest(page_token="nonsense"),
            CODE.INVALID_ARGUMENT, "PAGE_TOKEN_INVALID", "page_token",
        ),
        ("GetFeature", pb.GetFeatureRequest(feature=64), CODE.NOT_FOUND, "UNKNOWN_FEATURE", "feature"),
        ("ClassifyModality", pb.ClassifyModalityRequest(), CODE.INVALID_ARGUMENT, "INVALID_INPUT", "inputs"),
    ],
)  # fmt: skip
async def test_a_bad_request_gets_its_status_reason_and_field(
    open_gateway: Open, method: str, request_: Any, code: grpc.StatusCode, reason: str, field: str
) -> None:
    async with open_gateway() as gateway:
        with pytest.raises(aio.AioRpcError) as caught:
            await getattr(gateway.modality, method)(request_)
    assert caught.value.code() is code
    assert error_details(caught.value) == (reason, [field], None)


async def test_every_order_of_the_contract_is_a_column(open_gateway: Open) -> None:
    async with open_gateway() as gateway:
        for order in pb.FeatureOrder.values():
            for descending in (False, True):
                request = pb.ListFeaturesRequest(order_by=order, descending=descending, page_size=1000)
                answer = await gateway.modality.ListFeatures(request)
                assert sorted(card.feature for card in answer.cards) == list(range(64))


async def test_a_page_token_belongs_to_its_query(open_gateway: Open) -> None:
    async with open_gateway() as gateway:
        page = await gateway.modality.ListFeatures(pb.ListFeaturesRequest(page_size=1))
        other = pb.ListFeaturesRequest(page_size=1, descending=True, page_token=page.next_page_token)
        with pytest.raises(aio.AioRpcError) as caught:
            await gateway.modality.ListFeatures(other)
    assert error_details(caught.value)[0] == "PAGE_TOKEN_INVALID"


async def test_shares_add_up_and_follow_the_labels(open_gateway: Open, tiny: Bundle) -> None:
    async with open_gateway() as gateway:
        answer = await gateway.modality.ClassifyModality(
            pb.ClassifyModalityRequest(
                inputs=[common.Input(text="a"), common.Input(image=common.Image(data=b"b"))], top_features=100
            )
        )
    table = tiny.modality()
    assert len(answer.classifications) == 2
    for one in answer.classifications:
        assert [share.label for share in one.shares] == [1, 2, 3, 4, 5]
        # Five float32 shares: each is off by at most half a unit in its last place.
        assert sum(share.share for share in one.shares) == pytest.approx(1, abs=1e-6)
        by_label = dict.fromkeys(range(1, 6), 0.0)
        for feature in one.top_features:
            by_label[feature.label] += feature.share
            assert common.ModalityLabel.Name(feature.label).endswith(str(table.label[feature.feature]))
        assert [by_label[n] for n in range(1, 6)] == pytest.approx([s.share for s in one.shares], abs=1e-6)
        assert one.dominant_label == max(by_label, key=lambda label: by_label[label])
        assert one.active_features == len(one.top_features)


async def test_pairs_are_scored_with_the_settings_asked_for(open_gateway: Open, tiny: Bundle) -> None:
    pairs = [(f"image {n}".encode(), f"text {n}") for n in range(40)]
    settings = pb.ScoreSettings(dictionary="ncl", delta=0.1, bootstrap_samples=100, shuffles=100)

    def requests() -> Any:
        yield pb.ScoreModalityRequest(settings=settings)
        for start in range(0, 40, 16):
            yield batch(*pairs[start : start + 16])

    async with open_gateway() as gateway:
        first, second = [await gateway.modality.ScoreModality(requests()) for _ in range(2)]
        items = gateway.sample("monofacet_items_total", method="monofacet.v1.ModalityService/ScoreModality")
    assert first.pairs == 40
    assert items == 2 * 80
    assert first.settings.delta == np.float32(0.1)
    assert first.settings.false_discovery_rate == np.float32(0.05)
    assert first.settings.HasField("seed")
    assert list(first.cards) == list(second.cards)
    assert [card.name for card in first.cards] == tiny.modality("ncl").name.tolist()[: len(first.cards)]


async def test_a_score_that_waits_for_the_encoder_is_no_refused_call(open_gateway: Open) -> None:
    pairs = batch(*[(f"image {n}".encode(), f"text {n}") for n in range(6)])
    async with open_gateway(max_queued_items=16) as gateway:
        backlog = gateway.server._encoders[0]._backlog
        with backlog.admitted(12):
            call = asyncio.ensure_future(gateway.modality.ScoreModality(iter([SETTINGS, pairs])))
            # As long as ten of its questions whether there is room.
            await asyncio.sleep(0.2)
            assert not gateway.model.items and not backlog.overloaded
        assert (await call).pairs == 6


async def test_only_so_many_scores_run_at_once(open_gateway: Open) -> None:
    pairs = batch(*[(f"image {n}".encode(), f"text {n}") for n in range(6)])
    async with open_gateway(max_client_streams=1) as gateway:
        first = gateway.modality.ScoreModality()
        await first.write(SETTINGS)
        await first.write(pairs)
        while not gateway.model.items:
            await asyncio.sleep(0.01)
        second = gateway.modality.ScoreModality()
        # No more than the server waits for: grpc.aio replaces the status where a write fails (grpc/grpc#36066).
        await second.write(SETTINGS)
        with pytest.raises(aio.AioRpcError) as caught:
            await second
        await first.done_writing()
        assert (await first).pairs == 6
        assert (await gateway.modality.ScoreModality(iter([SETTINGS, pairs]))).pairs == 6
    assert caught.value.code() is CODE.RESOURCE_EXHAUSTED
    assert error_details(caught.value) == ("TOO_MANY_CALLS", [], 0.25)


async def test_one_callers_scores_leave_places_to_others(open_gateway: Open, tmp_path: Path) -> None:
    pairs = batch(*[(f"image {n}".encode(), f"text {n}") for n in range(6)])
    made = [new_token(name, frozenset([Scope.READ]), None) for name in ("alice", "bob")]
    (tmp_path / "tokens").write_text("".join(f"{line}\n" for _, line in made))
    alice, bob = ((("authorization", f"Bearer {token}"),) for token, _ in made)
    async with open_gateway(max_client_streams=4, tokens_file=tmp_path / "tokens") as gateway:
        hers = [gateway.modality.ScoreModality(metadata=alice) for _ in range(2)]
        for call in hers:
            await call.write(SETTINGS)
        while gateway.server._client_streams.streams < 2:
            await asyncio.sleep(0.01)
        third = gateway.modality.ScoreModality(metadata=alice)
        await third.write(SETTINGS)
        with pytest.raises(aio.AioRpcError) as caught:
            await third
        assert error_details(caught.value)[0] == "TOO_MANY_CALLS"
        assert (await gateway.modality.ScoreModality(iter([SETTINGS, pairs]), metadata=bob)).pairs == 6
        for call in hers:
            call.cancel()


async def test_an_idle_score_gives_up_its_place(open_gateway: Open) -> None:
    pairs = batch(*[(f"image {n}".encode(), f"text {n}") for n in range(6)])
    async with open_gateway(max_client_streams=1, client_stream_idle_s=0.2) as gateway:
        idle = gateway.modality.ScoreModality()
        await idle.write(SETTINGS)
        with pytest.raises(aio.AioRpcError) as caught:
            await idle
        assert (await gateway.modality.ScoreModality(iter([SETTINGS, pairs]))).pairs == 6
    assert caught.value.code() is CODE.ABORTED
    assert error_details(caught.value)[0] == "STREAM_IDLE"


@pytest.mark.parametrize(
    ("requests", "reason", "fields"),
    [
        (
            [batch((b"a", "a"), (b"b", "b")), batch((b"c", "c"), (b"bad", "d"))],
            "IMAGE_CORRUPT", ["pairs[3].image.data"],
        ),
        ([batch((b"a", "a")), batch((b"b", "x" * 101))], "TEXT_TOO_LONG", ["pairs[1].text"]),
        ([batch((b"a", "a")), batch((b"b", ""))], "INVALID_INPUT", ["pairs[1].text"]),
        ([batch((b"a", "a"))], "NOT_ENOUGH_PAIRS", []),
        ([], "NOT_ENOUGH_PAIRS", []),
        ([batch(*[(b"a", "a")] * 9)], "TOO_MANY_PAIRS", ["pairs[8]"]),
        ([batch((b"a", "a")), pb.ScoreModalityRequest(settings=pb.ScoreSettings())], "INVALID_INPUT", ["settings"]),
    ],
    ids=["image", "text", "rule", "one pair", "no pair", "too many", "settings late"],
)  # fmt: skip
async def test_a_bad_pair_ends_the_stream_and_is_counted_over_it(
    open_gateway: Open, requests: list[Any], reason: str, fields: list[str]
) -> None:
    async with open_gateway(max_score_pairs=8) as gateway:
        with pytest.raises(aio.AioRpcError) as caught:
            await gateway.modality.ScoreModality(iter(requests))
    assert caught.value.code() is CODE.INVALID_ARGUMENT
    assert error_details(caught.value) == (reason, fields, None)


async def test_get_model_answers_every_limit_and_every_file(open_gateway: Open, tiny: Bundle) -> None:
    async with open_gateway() as gateway:
        answer = await gateway.models.GetModel(model_service_pb2.GetModelRequest())
        by_name = await gateway.models.GetModel(model_service_pb2.GetModelRequest(bundle="tiny"))
        with pytest.raises(aio.AioRpcError) as caught:
            await gateway.models.GetModel(model_service_pb2.GetModelRequest(bundle="other"))
        listed = await gateway.models.ListModels(model_service_pb2.ListModelsRequest())
    model = answer.model
    assert model == by_name.model
    assert model.sha256 == tiny.sha256
    assert {file.path: file.sha256 for file in model.files} == {
        path: entry.sha256 for path, entry in tiny.manifest.files.items()
    }
    assert {d.name for d in model.dictionaries} == set(tiny.dictionary_names)
    assert [d.name for d in model.dictionaries if d.is_default] == ["sae"]
    unset = [f.name for f in model.limits.DESCRIPTOR.fields if not getattr(model.limits, f.name)]
    assert unset == []
    assert caught.value.code() is CODE.NOT_FOUND
    assert error_details(caught.value)[:2] == ("UNKNOWN_MODEL", ["bundle"])
    assert not listed.models[0].files


async def test_models_tell_the_replicas_that_run_and_not_those_that_were_asked_for(
    open_gateway: Open,
) -> None:
    async with open_gateway(encoder_replicas=3) as gateway:
        running = []
        for serving in (True, False):
            await gateway.server.set_serving(serving)
            answer = await gateway.models.GetModel(model_service_pb2.GetModelRequest())
            listed = await gateway.models.ListModels(model_service_pb2.ListModelsRequest())
            running.append((answer.model.runtime.replicas, listed.models[0].runtime.replicas))
    assert running == [(1, 1), (0, 0)]
