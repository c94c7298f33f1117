"""Several bundles behind one gateway: each request reaches the models of the bundle that it names."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc import aio
from monofacet.v1 import bias_service_pb2, common_pb2, defense_service_pb2, imaging_service_pb2
from monofacet.v1 import feature_service_pb2 as features
from monofacet.v1 import modality_service_pb2 as modality
from monofacet.v1 import model_service_pb2 as models
from numpy.typing import NDArray
from typer.testing import CliRunner

from deployments.cluster.app import build, from_config
from deployments.encoder.encoder import Encoder
from deployments.encoder.model import TowerModel
from deployments.encoder.tasks import ScoreRequest
from deployments.gateway.bundles import Backend
from deployments.gateway.catalogue import Catalogue
from deployments.gateway.server import GatewayServer
from deployments.gateway.services import DESCRIPTORS
from deployments.operations.served import NamesClash, read_served
from deployments.operations.settings import Settings
from services.bundle.load import CLIP_CONFIG, SELFCHECK, Bundle, refresh_manifest
from services.bundle.selfcheck import write_selfcheck
from services.errors import SelfCheckMismatch
from services.modality.tables import ModalityTable
from tests.deployments.conftest import array, error_details
from tests.deployments.debug import DebugDictionary, DebugModel
from tests.support.tiny_bundle import make_tiny_bundle
from training.build.selfcheck import probe_of_folder


class Backwards(DebugModel):
    """Embeds like the debug model, but for the order of the dimensions."""

    def prepare(self, item: bytes | str, truncate_text: bool) -> NDArray[Any]:
        return super().prepare(item, truncate_text)[::-1].copy()


@dataclasses.dataclass
class Two:
    """A gateway of two bundles."""

    server: GatewayServer
    channel: aio.Channel
    models: dict[str, DebugModel]
    ids: dict[str, str]

    def call(self, service: str, method: str) -> Any:
        descriptor = next(d for d in DESCRIPTORS if d.name == service)
        found = descriptor.methods_by_name[method]
        kind = f"{'stream' if found.client_streaming else 'unary'}_{'stream' if found.server_streaming else 'unary'}"
        from google.protobuf.message_factory import GetMessageClass

        return getattr(self.channel, kind)(
            f"/{descriptor.full_name}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=GetMessageClass(found.output_type).FromString,
        )

    def sample(self, name: str, **labels: str) -> float | None:
        return self.server.metrics.registry.get_sample_value(name, labels)


@asynccontextmanager
async def two_bundles(tiny: Bundle) -> AsyncIterator[Two]:
    settings = Settings(port=0, metrics_port=0, drain_s=5.0, linger_s=0.0, retry_after_s=0.25)
    other = dataclasses.replace(
        tiny, manifest=dataclasses.replace(tiny.manifest, name="other"), sha256="f" * 64
    )
    debug = {"tiny": DebugModel(), "other": Backwards()}
    dictionaries: Any = dict.fromkeys(tiny.dictionary_names, DebugDictionary())
    encoders = [Encoder(settings, model, dictionaries) for model in debug.values()]

    def backend(encoder: Encoder) -> Backend:
        async def score(request: ScoreRequest) -> ModalityTable:
            answer = await encoder.score(request)
            if isinstance(answer, Exception):
                raise answer
            assert isinstance(answer, ModalityTable)
            return answer

        return Backend(encoder.encode, score, encoder.info())

    server = GatewayServer(settings, Catalogue.read(tiny), Catalogue.read(other))
    port, _ = await server.open()
    await server.serve_all([backend(encoder) for encoder in encoders])
    async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            yield Two(server, channel, debug, {"tiny": tiny.id, "other": other.id})
        finally:
            await server.drain()
            for encoder in encoders:
                await encoder.close()


def text(value: str) -> common_pb2.Input:
    return common_pb2.Input(text=value)


async def failure(call: Any) -> tuple[grpc.StatusCode, str, list[str]]:
    with pytest.raises(aio.AioRpcError) as caught:
        if isinstance(call, aio.StreamUnaryCall | aio.UnaryUnaryCall):
            await call
        else:
            _ = [response async for response in call]
    reason, fields, _ = error_details(caught.value)
    return caught.value.code(), reason, fields


async def test_each_request_is_answered_by_the_bundle_that_it_names(tiny: Bundle) -> None:
    async with two_bundles(tiny) as two:
        encode = two.call("FeatureService", "Encode")
        answers = {
            asked: await encode(features.EncodeRequest(inputs=[text("a")], bundle=asked))
            for asked in ("", "tiny", tiny.id, "other", two.ids["other"])
        }
        assert [answer.bundle for answer in answers.values()] == [
            tiny.id, tiny.id, tiny.id, two.ids["other"], two.ids["other"]
        ]  # fmt: skip
        np.testing.assert_array_equal(
            array(answers["other"].embeddings)[0], array(answers[""].embeddings)[0, ::-1]
        )
        assert (two.models["tiny"].items, two.models["other"].items) == (3, 2)


async def test_a_stream_is_of_the_bundle_that_its_first_message_names(tiny: Bundle) -> None:
    def item(name: str, bundle: str = "") -> features.StreamEncodeRequest:
        return features.StreamEncodeRequest(
            item=features.StreamItem(id=name, input=text(name)), bundle=bundle
        )

    async with two_bundles(tiny) as two:
        stream = two.call("FeatureService", "StreamEncode")
        messages = [features.StreamEncodeRequest(options=features.EncodeOptions(), bundle="other")]
        messages += [item("1"), item("2", "other")]
        answers = [answer async for answer in stream(iter(messages))]
        assert [(answer.id, answer.bundle) for answer in answers] == [
            (name, two.ids["other"]) for name in "12"
        ]
        assert [answer.bundle async for answer in stream(iter([item("1")]))] == [tiny.id]
        assert [answer async for answer in stream(iter([]))] == []
        changed = [item("1"), item("2", "other")]
        assert await failure(stream(iter(changed))) == (
            grpc.StatusCode.INVALID_ARGUMENT, "INVALID_INPUT", ["bundle"]
        )  # fmt: skip


async def test_a_bundle_that_is_not_served_is_not_found_by_any_method(tiny: Bundle) -> None:
    image = common_pb2.Image(data=b"x")
    requests = {
        "Encode": features.EncodeRequest(inputs=[text("a")]),
        "StreamEncode": features.StreamEncodeRequest(options=features.EncodeOptions()),
        "ListFeatures": modality.ListFeaturesRequest(),
        "GetFeature": modality.GetFeatureRequest(),
        "ClassifyModality": modality.ClassifyModalityRequest(inputs=[text("a")]),
        "ScoreModality": modality.ScoreModalityRequest(settings=modality.ScoreSettings()),
        "ClassifyGender": bias_service_pb2.ClassifyGenderRequest(inputs=[text("a")]),
        "AuditGender": bias_service_pb2.AuditGenderRequest(settings=bias_service_pb2.AuditSettings()),
        "FilterAdversarial": defense_service_pb2.FilterAdversarialRequest(images=[image]),
        "Generate": imaging_service_pb2.GenerateRequest(),
        "PreviewSteering": imaging_service_pb2.PreviewSteeringRequest(
            input=text("a"), steering=imaging_service_pb2.Steering()
        ),
        "ListAttributes": imaging_service_pb2.ListAttributesRequest(),
        "GetAttribute": imaging_service_pb2.GetAttributeRequest(name="blue"),
        "GetModel": models.GetModelRequest(),
    }
    named = {
        method.name: (service.name, method.client_streaming)
        for service in DESCRIPTORS
        for method in service.methods
    }
    # A new method must name its bundle, too, or be of the server as a whole.
    assert set(named) - {"ListModels"} == set(requests)
    async with two_bundles(tiny) as two:
        for method, request in requests.items():
            service, streaming = named[method]
            request.bundle = "gone"  # type: ignore[attr-defined]
            call = two.call(service, method)(iter([request]) if streaming else request)
            assert await failure(call) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_MODEL", ["bundle"]), method


async def test_all_bundles_are_listed_and_measured_and_one_is_the_default(tiny: Bundle) -> None:
    async with two_bundles(tiny) as two:
        listed = await two.call("ModelService", "ListModels")(models.ListModelsRequest())
        assert [(m.name, m.bundle, m.is_default) for m in listed.models] == [
            ("tiny", tiny.id, True), ("other", two.ids["other"], False)
        ]  # fmt: skip
        assert listed.bundle == tiny.id
        get = two.call("ModelService", "GetModel")
        for asked, name in (("", "tiny"), ("other", "other"), (two.ids["other"], "other")):
            answer = await get(models.GetModelRequest(bundle=asked))
            assert (answer.model.name, len(answer.model.files) > 0) == (name, True)
        for name, sha256 in (("tiny", tiny.sha256), ("other", "f" * 64)):
            labels = {"bundle": two.ids[name], "sha256": sha256, "device": "cpu"}
            assert two.sample("monofacet_model_info", **labels) == 1
        await two.call("FeatureService", "Encode")(features.EncodeRequest(inputs=[text("a")], bundle="other"))
        assert two.sample("monofacet_batch_size_count", deployment="encoder-other") == 1
        assert not two.sample("monofacet_batch_size_count", deployment="encoder")


async def test_a_page_token_is_of_one_bundle(tiny: Bundle) -> None:
    async with two_bundles(tiny) as two:
        listing = two.call("ModalityService", "ListFeatures")
        first = await listing(modality.ListFeaturesRequest(page_size=2, bundle="other"))
        token = {"page_size": 2, "page_token": first.next_page_token}
        second = await listing(modality.ListFeaturesRequest(**token, bundle=two.ids["other"]))
        assert second.cards[0].feature == 2
        assert await failure(listing(modality.ListFeaturesRequest(**token))) == (
            grpc.StatusCode.INVALID_ARGUMENT, "PAGE_TOKEN_INVALID", ["page_token"]
        )  # fmt: skip


async def test_a_server_serves_while_any_bundle_has_an_encoder(tiny: Bundle) -> None:
    async with two_bundles(tiny) as two:
        for states in ((True, False), (False, False), (False, True)):
            for name, alive in zip(("tiny", "other"), states, strict=True):
                await two.server.set_serving(alive, name)
            assert two.sample("monofacet_serving", service="server") == any(states)


@pytest.fixture(scope="module")
def another(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_tiny_bundle(tmp_path_factory.mktemp("another") / "another", seed=1, name="another")


def test_the_application_has_an_encoder_a_bundle(tiny: Bundle, another: Bundle) -> None:
    built: Any = from_config({"bundles": [str(tiny.path), str(another.path)]})
    settings, served, encoders, generators = built._bound_deployment.init_args
    assert [bundle.name for bundle in served] == ["tiny", "another"]
    assert [encoder._bound_deployment.name for encoder in encoders] == ["encoder", "encoder-another"]
    assert [encoder._bound_deployment.init_args[0].bundle for encoder in encoders] == [
        tiny.path,
        another.path,
    ]
    assert generators == [None, None]
    assert settings.served == (tiny.path, another.path)


def test_one_bundle_is_served_as_before_however_it_is_named(tiny: Bundle) -> None:
    for settings in (Settings(bundle=tiny.path), Settings(bundles=(tiny.path,))):
        built: Any = build(settings)
        _, (served,), (encoder,), _ = built._bound_deployment.init_args
        assert (served.default, encoder._bound_deployment.name) == (True, "encoder")


def test_bundles_come_from_the_environment_as_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("/a:/b", '["/a", "/b"]'):
        monkeypatch.setenv("MONOFACET_BUNDLES", value)
        assert Settings().served == (Path("/a"), Path("/b"))
    with pytest.raises(ValueError, match="bundle is /c and bundles begins with /a"):
        Settings(bundle=Path("/c"))
    assert Settings(bundle=Path("/a")).served == (Path("/a"), Path("/b"))


def test_two_bundles_of_one_name_are_refused_in_one_line(tiny: Bundle, tmp_path: Path) -> None:
    import typer

    from deployments.serve import serve

    twin = make_tiny_bundle(tmp_path / "twin", seed=1)
    with pytest.raises(NamesClash, match="both named 'tiny'"):
        read_served(Settings(bundles=(tiny.path, twin.path)))
    app = typer.Typer()
    app.command()(serve)
    done = CliRunner().invoke(app, ["--bundle", str(tiny.path), "--bundle", str(twin.path)])
    assert done.exit_code == 2
    (line,) = done.output.splitlines()
    assert str(tiny.path) in line and str(twin.path) in line and "both named 'tiny'" in line


def test_an_encoder_does_not_start_on_towers_that_answer_otherwise(tiny: Bundle, tmp_path: Path) -> None:
    path = Path(shutil.copytree(tiny.path, tmp_path / "probed"))
    probe = probe_of_folder((path / CLIP_CONFIG).parent)
    settings = Settings(backend="torch", threads=1)
    for changed in (probe, dataclasses.replace(probe, captions=probe.captions[::-1])):
        write_selfcheck(path / SELFCHECK, changed)
        refresh_manifest(path)
        if changed is probe:
            TowerModel(Bundle.load(path), settings).close()
        else:
            with pytest.raises(SelfCheckMismatch, match="text tower"):
                TowerModel(Bundle.load(path), settings)
