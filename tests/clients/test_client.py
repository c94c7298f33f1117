"""Client and AsyncClient against the mock transport: the same behaviour, call by call."""

from __future__ import annotations

import asyncio
import inspect
import io
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import monofacet
import numpy as np
import PIL.Image
import pytest
from monofacet import AsyncClient, Client
from monofacet._inputs import MAX_IMAGE_BYTES
from monofacet.testing import FakeMonofacet, mock_async_client

from tests.clients.conftest import Call


def test_both_clients_have_the_same_calls_and_parameters() -> None:
    public = {name for name in dir(Client) if not name.startswith("_")}
    assert public == {name for name in dir(AsyncClient) if not name.startswith("_")}
    for name in public - {"target", "bundle", "close"}:
        ours, theirs = inspect.signature(getattr(Client, name)), inspect.signature(getattr(AsyncClient, name))
        assert list(ours.parameters) == list(theirs.parameters), name
        for parameter in ours.parameters:
            assert ours.parameters[parameter].default == theirs.parameters[parameter].default, (
                name,
                parameter,
            )


def test_encode_gives_unit_embeddings_and_norms(both: Call, picture: Path) -> None:
    result = both().encode(["a heart", picture, picture.read_bytes()])
    assert result.embeddings.shape == (3, 8)
    assert np.allclose(np.linalg.norm(result.embeddings, axis=1), 1, atol=1e-6)  # float32
    assert np.array_equal(result.embeddings[1], result.embeddings[2])
    assert (result.norms > 0).all()
    assert result.features == ()
    assert result.bundle == "fake@000000000000"


def test_encode_gives_features_of_the_default_dictionary_for_an_empty_name(both: Call) -> None:
    result = both().encode(["a heart", "a star"], dictionary="", max_features=2, embeddings=False)
    assert [item.dictionary for item in result.features] == ["fake-sae"] * 2
    assert all(len(item) == 2 and item.values[0] >= item.values[1] for item in result.features)
    assert result.embeddings.shape == (2, 0)


def test_a_batch_past_the_limits_is_split_and_joined(both: Call) -> None:
    client = both()
    result = client.encode([str(n) for n in range(600)], dictionary="")
    assert result.embeddings.shape == (600, 8)
    assert len(result.features) == 600
    sizes = [len(request.inputs) for method, request in client.channel.calls if method.endswith("/Encode")]
    assert sizes == [256, 256, 88]
    assert np.array_equal(result.embeddings[300], client.encode("300").embeddings[0])


def test_a_server_with_lower_limits_is_asked_once_and_obeyed(both: Call) -> None:
    class Small(FakeMonofacet):
        def model(self) -> Any:
            model = super().model()
            model.limits.max_inputs = 40
            return model

    client = both(Small())
    client.encode([str(n) for n in range(100)])
    client.encode([str(n) for n in range(50)])
    methods = [method.rpartition("/")[2] for method, _ in client.channel.calls]
    assert methods == ["GetModel", "Encode", "Encode", "Encode", "Encode", "Encode"]
    assert [len(r.inputs) for m, r in client.channel.calls if m.endswith("/Encode")] == [40, 40, 20, 40, 10]


class Narrow(FakeMonofacet):
    """Takes small requests only."""

    MAX_REQUEST_BYTES = 300_000

    def model(self) -> Any:
        model = super().model()
        model.limits.max_request_bytes = self.MAX_REQUEST_BYTES
        return model


@pytest.mark.parametrize(
    "call",
    [
        lambda client, texts, pictures: client.encode(texts),
        lambda client, texts, pictures: client.classify_modality(texts),
        # 65,536 ids are 180 kB, and go with each part.
        lambda client, texts, pictures: client.classify_gender(
            texts, ablation=monofacet.Ablation(features=range(65_536))
        ),
        lambda client, texts, pictures: client.filter_adversarial(pictures, labels=["a" * 10_000] * 20),
    ],
    ids=["encode", "classify_modality", "classify_gender", "filter_adversarial"],
)
def test_every_part_of_a_batch_fits_with_all_that_it_carries(both: Call, call: Any) -> None:
    client = both(Narrow())
    result = call(client, ["x" * 5000] * 100, [b"\x89PNG" + b"x" * 5000] * 100)
    assert len(result) == 100
    sizes = [r.ByteSize() for method, r in client.channel.calls if not method.endswith("/GetModel")]
    assert max(sizes) <= Narrow.MAX_REQUEST_BYTES
    # And is filled, but for one input and some room.
    assert min(sizes[:-1]) > Narrow.MAX_REQUEST_BYTES - 10_000


def test_every_bad_input_is_named_and_counted_from_the_start(both: Call) -> None:
    inputs: list[Any] = ["x"] * 300
    inputs[258] = inputs[299] = b"not an image"
    with pytest.raises(monofacet.InvalidInputError) as caught:
        both().encode(inputs)
    assert [v.field for v in caught.value.violations] == ["inputs[258].image.data", "inputs[299].image.data"]


def test_a_stream_answers_each_item_in_order(both: Call, picture: Path) -> None:
    client = both()
    items = ["a", ("named", picture), b"not an image", picture.parent / "gone.png", "b", 7]
    results = client.stream_encode(items, dictionary="")
    assert [result.id for result in results] == ["0", "named", "2", "3", "4", "5"]
    assert [result.ok for result in results] == [True, True, False, False, True, False]
    assert isinstance(results[2].error, monofacet.InvalidInputError)
    assert results[2].error.violations[0].field == "input.image.data"
    assert isinstance(results[3].error, monofacet.InputError)
    assert "gone.png" in str(results[3].error)
    single = client.encode(["a", picture], dictionary="")
    assert np.array_equal(results[0].embedding, single.embeddings[0])
    assert np.array_equal(results[1].features.indices, single.features[1].indices)


def test_a_stream_of_unreadable_items_ends_well(both: Call, tmp_path: Path) -> None:
    results = both().stream_encode([tmp_path / "1.png", tmp_path / "2.png"])
    assert [result.ok for result in results] == [False, False]


def test_an_item_that_cannot_be_sent_is_its_own_result_whatever_is_wrong_with_it(both: Call) -> None:
    tiff = io.BytesIO()
    PIL.Image.effect_noise((64, 64), 50).save(tiff, "TIFF")
    bad: list[Any] = [
        b"x" * (MAX_IMAGE_BYTES + 1),
        PIL.Image.open(io.BytesIO(tiff.getvalue()[:800])),
        PIL.Image.new("RGB", (0, 0)),
        "a lone \ud800 surrogate",
        # As the name of a file that is no UTF-8 comes from the system.
        ("\udcff.png", "a"),
        ("no", "pair", "of id and input"),
        (),
    ]
    results = both().stream_encode(["first", *bad, "last"])
    assert [result.ok for result in results] == [True, *[False] * len(bad), True]
    for result in results[1:-1]:
        assert isinstance(result.error, monofacet.InputError), result


def test_an_empty_stream_has_no_results(both: Call) -> None:
    assert both().stream_encode([]) == []


def test_the_iterables_own_error_reaches_the_caller(both: Call, picture: Path) -> None:
    def broken() -> Iterator[Any]:
        yield "a"
        raise KeyError("the caller's own")

    with pytest.raises(KeyError, match="the caller's own"):
        both().stream_encode(broken())
    with pytest.raises(monofacet.InputError, match=r"pairs\[1\]"):
        both().score_modality([(picture, "red"), (picture.parent / "gone.png", "blue")])


def test_a_server_that_answers_out_of_order_is_an_error(both: Call) -> None:
    class Confused(FakeMonofacet):
        def StreamEncode(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:
            yield from reversed(list(super().StreamEncode(requests, context)))

    with pytest.raises(monofacet.ResponseError, match="answered item '1' when '0' was next"):
        both(Confused()).stream_encode(["a", "b"])


def test_a_server_that_drops_items_is_an_error(both: Call) -> None:
    class Lazy(FakeMonofacet):
        def StreamEncode(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:
            yield from list(super().StreamEncode(requests, context))[:1]

    with pytest.raises(monofacet.ResponseError, match="without answering item '1'"):
        both(Lazy()).stream_encode(["a", "b"])


def test_features_go_over_all_pages(both: Call) -> None:
    client = both()
    cards = client.features(labels=["image", "cross"])
    assert [card.feature for card in cards] == [0, 2, 5, 7, 10, 12, 15, 17]
    page = client.features_page(labels="cross", page_size=3)
    assert (page.total, len(page.cards), page.dictionary) == (4, 3, "fake-sae")
    rest = client.features_page(labels="cross", page_size=3, page_token=page.next_page_token)
    assert [card.feature for card in (*page.cards, *rest.cards)] == [2, 7, 12, 17]
    assert rest.next_page_token == ""


@pytest.mark.parametrize(
    ("limit", "pages"), [(None, [200]), (1000, [200]), (20, [20]), (3, [3]), (1, [1]), (0, [])]
)
def test_features_end_at_a_limit_without_asking_for_more(
    both: Call, limit: int | None, pages: list[int]
) -> None:
    client = both()
    assert [card.feature for card in client.features(limit=limit)] == list(range(20))[:limit]
    assert [request.page_size for _, request in client.channel.calls] == pages


def test_a_limit_goes_over_pages_as_small_as_the_server_makes_them(both: Call) -> None:
    class Small(FakeMonofacet):
        def ListFeatures(self, request: Any, context: Any) -> Any:
            # Of the request as it is noted, too.
            request.page_size = min(request.page_size, 4)
            return super().ListFeatures(request, context)

    client = both(Small())
    assert [card.feature for card in client.features(limit=10)] == list(range(10))
    assert [request.page_size for _, request in client.channel.calls] == [4, 4, 2]


def test_dead_features_have_no_measures(both: Call) -> None:
    (card, *_) = both().features(labels=[monofacet.ModalityLabel.DEAD])
    assert card.mds_energy is None
    assert card.paper_label is None


def test_a_feature_comes_with_pictures_and_texts(both: Call) -> None:
    detail = both().feature(2)
    assert detail.card.label is monofacet.ModalityLabel.CROSS
    assert detail.images[0].image.size == (1, 1)
    assert detail.texts[0].text == "a white dot"
    assert both().feature(2, max_images=0).images == ()


def test_what_does_not_exist_is_not_found(both: Call) -> None:
    for call in (
        lambda client: client.feature(99),
        lambda client: client.features(dictionary="other"),
        lambda client: client.encode("a", dictionary="other"),
        lambda client: client.model("other"),
    ):
        with pytest.raises(monofacet.NotFoundError):
            call(both())


def test_energy_shares_add_up_to_one(both: Call, picture: Path) -> None:
    result = both().classify_modality(["a heart", picture], top_features=3)
    assert len(result) == 2
    for item in result.classifications:
        assert sum(item.shares.values()) == pytest.approx(1, abs=1e-5)  # float32 on the wire
        assert item.shares[item.dominant_label] == max(item.shares.values())
        assert len(item.top_features) == 3


def test_pairs_give_a_table_with_the_settings_as_used(both: Call, picture: Path) -> None:
    client = both()
    settings = monofacet.ScoreSettings(delta=0.1, seed=7)
    table = client.score_modality([(picture, f"red {n}", "g") for n in range(70)], settings)
    assert table.pairs == 70
    assert table.settings.dictionary == "fake-sae"
    assert table.settings.delta == pytest.approx(0.1)
    assert (table.settings.seed, table.settings.shuffles) == (7, 1000)
    assert table.counts() == dict.fromkeys(monofacet.ModalityLabel, 4)
    assert np.isnan(table.column("mds_energy")[4])
    sent = [request for _, request in client.channel.calls if request.WhichOneof("payload") == "batch"]
    assert sum(len(request.batch.pairs) for request in sent) == 70
    assert sent[0].batch.pairs[0].group == "g"


def test_a_bad_pair_is_named(both: Call, picture: Path) -> None:
    with pytest.raises(monofacet.InvalidInputError) as caught:
        both().score_modality([*[(picture, "red")] * 40, (b"nothing", "x")])
    assert caught.value.violations[0].field == "pairs[40].image.data"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.score_modality([], monofacet.ScoreSettings(seed=-1)), "seed cannot be sent"),
        (lambda c: c.score_modality([], monofacet.ScoreSettings(delta="x")), "delta cannot be sent"),
        (lambda c: c.score_modality([(b"x", "\ud800")]), r"pairs\[0\]"),
        (lambda c: c.audit_gender([], monofacet.AuditSettings(bootstrap_samples=-1)), "bootstrap_samples"),
        (lambda c: c.audit_gender([], monofacet.AuditSettings(seed=2**64)), "seed cannot be sent"),
        (lambda c: c.audit_gender([monofacet.LabelledItem("a", id="\ud800")]), r"items\[0\]"),
        (lambda c: c.features(min_mds="x"), "min_mds cannot be sent"),
        (lambda c: c.features(limit=-1), "limit is a number from 0"),
        (lambda c: c.features(limit="x"), "limit cannot be sent"),
        (lambda c: c.features(labels=[3]), "3 is no label"),
        (lambda c: c.features(labels=3), "the query cannot be sent"),
        (lambda c: c.features(order_by=3), "cannot be ordered by 3"),
        (lambda c: c.features(name_contains="\ud800"), "the query cannot be sent"),
        (lambda c: c.features_page(page_size="x"), "page_size cannot be sent"),
        (lambda c: c.feature(1.5), "the request cannot be sent"),
        (lambda c: c.encode("a", dictionary="\ud800"), "the options cannot be sent"),
        (lambda c: c.classify_modality("a", top_features="x"), "top_features cannot be sent"),
        (
            lambda c: c.classify_gender("a", ablation=monofacet.Ablation(top_gender_features=2**32)),
            "the ablation cannot be sent",
        ),
        (lambda c: c.filter_adversarial(b"x", mode=3), "3 is no filter mode"),
        (lambda c: c.filter_adversarial(b"x", labels=["a", "\ud800"]), "the request cannot be sent"),
        (
            lambda c: c.preview_steering("a", monofacet.SteeringEdit(1, scale="x")),
            r"edits\[0\]: the edit cannot be sent",
        ),
        (lambda c: c.generate("\ud800"), "the request cannot be sent"),
    ],
)
def test_a_value_that_no_request_can_hold_is_an_input_error(both: Call, call: Any, message: str) -> None:
    with pytest.raises(monofacet.InputError, match=message):
        call(both())


def test_models_say_what_is_served(both: Call) -> None:
    (model,) = both().models()
    assert model.default_dictionary.name == "fake-sae"
    assert model.tower.embed_dim == 8
    assert model.limits.image_formats == ("PNG", "JPEG", "WEBP")
    assert model.limits.max_call_duration == 300
    assert both().model("fake").files == {"manifest.json": "0" * 64}


def test_health_says_serving_or_unknown(both: Call) -> None:
    assert both().health() == "SERVING"
    assert both().health("monofacet.v1.FeatureService") == "SERVING"
    assert both().health("other") == "SERVICE_UNKNOWN"


async def test_an_async_stream_takes_async_items() -> None:
    async def items() -> AsyncIterator[tuple[str, str]]:
        for name in "abc":
            await asyncio.sleep(0)
            yield name, f"text {name}"

    client, _ = mock_async_client()
    assert [result.id async for result in client.stream_encode(items())] == ["a", "b", "c"]


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_settings_that_cannot_work_are_refused_at_once(kind: type[Any], tmp_path: Path) -> None:
    for options in (
        {"target": ""},
        {"target": "https://example.org:443"},
        {"target": "example.org:9000", "token": "secret"},
        {"timeout": -1.0},
        {"timeout": 0},
        {"tls": monofacet.TLS(ca=tmp_path / "gone.pem")},
        {"tls": monofacet.TLS(certificate=b"x")},
    ):
        with pytest.raises(monofacet.InputError):
            kind(**options)


@pytest.mark.parametrize("target", ["localhost:9000", "127.0.0.1:9000", "[::1]:9000", "unix:/tmp/socket"])
def test_a_token_may_stay_on_this_machine_unencrypted(target: str) -> None:
    Client(target, token="secret").close()


def test_a_token_from_a_file_is_sent_without_its_line_break(both: Call, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret\r\n")
    client = both(token=(tmp_path / "token").read_text())
    client.encode("a")
    assert client.channel.metadata == [(("authorization", "Bearer secret"),)]


@pytest.mark.parametrize("token", ["two words", "two\nlines", "gehe\u00edm", "gone\x7f"])
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_token_that_no_header_can_hold_is_refused_and_stays_secret(kind: type[Any], token: str) -> None:
    with pytest.raises(monofacet.InputError, match="printable ASCII") as caught:
        kind(token=token)
    assert token not in str(caught.value)


def test_a_token_may_go_unencrypted_over_a_network_that_is_said_to_be_private() -> None:
    Client("example.org:9000", token="secret", tls=False).close()
