"""Each kind of pipeline, loaded through a bundle: against diffusers' own pipeline, steered, and refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from services.bundle.load import Bundle, refresh_manifest
from services.bundle.manifest import MANIFEST_NAME, parse_manifest
from services.encoding.texts import TextLimits
from services.errors import (
    BundleFileError,
    InvalidInput,
    ManifestError,
    NoPipeline,
    SteeringUnsupported,
    TextTooLong,
    UnsafeWeights,
    UnsupportedModel,
)
from services.imaging.edits import AttributeEdit, Edit, FromReference, Scale, SetQuantile, Steering
from services.imaging.generator import ImageRequest, Imaging
from services.imaging.pipeline import load_parts
from services.imaging.reference import folder_sha256, pipeline_folder
from services.modality.tables import Label
from tests.services.imaging.conftest import Load
from tests.support.tiny_attributes import make_attributes
from tests.support.tiny_pipeline import add_tiny_pipeline

EDITS = (Edit(Label.IMAGE, SetQuantile(0.9)), Edit((1, 2, 3), Scale(2.0), strength=0.5))

# The same float32 operations in another order; the stock pipeline computes pointwise convolutions otherwise.
STOCK = {"atol": 2e-4, "rtol": 0}


def picture(bundle: Bundle, number: int = 0) -> bytes:
    return (bundle.path / f"samples/{number}.png").read_bytes()


def pixels(imaging: Imaging, *requests: ImageRequest, batch: int = 8) -> list[bytes]:
    return [made.image.tobytes() for made in imaging.generate(requests, batch)]


def latents(imaging: Imaging, request: ImageRequest) -> torch.Tensor:
    sample = imaging.prepare(request)
    while not sample.done:
        imaging.step([sample])
    assert sample.error is None
    return sample.latents


def stock(bundle: Bundle, kind: str) -> Any:
    """Return diffusers' own pipeline of the same folder."""
    import diffusers

    folder = bundle.path / "diffusion"
    pipeline: Any = getattr(diffusers, json.loads((folder / "model_index.json").read_text())["_class_name"])
    absent: dict[str, Any] = {"feature_extractor": None}
    absent["image_encoder" if kind == "unclip" else "safety_checker"] = None
    made = pipeline.from_pretrained(folder, **absent)
    made.set_progress_bar_config(disable=True)
    return made


class AnyEncoder(torch.nn.Linear):
    """What the stock pipeline asks for its device and type even where embeddings are given."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self) -> None:
        super().__init__(1, 1)


def test_an_unclip_pipeline_makes_what_diffusers_makes(load_kind: Load) -> None:
    bundle, imaging = load_kind("unclip")
    pipe = stock(bundle, "unclip")
    pipe.image_encoder = AnyEncoder()
    embedding = imaging.embed_image(picture(bundle))
    expected = pipe(
        prompt="red circle",
        image_embeds=torch.from_numpy(embedding.unit)[None] * embedding.norm,
        num_inference_steps=4,
        guidance_scale=3.0,
        height=16,
        width=16,
        generator=torch.Generator().manual_seed(7),
        output_type="latent",
    ).images
    ours = latents(imaging, ImageRequest("red circle", image=picture(bundle), seed=7))
    torch.testing.assert_close(ours, expected, **STOCK)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_a_stable_diffusion_pipeline_makes_what_diffusers_makes(load_kind: Load, guidance: float) -> None:
    bundle, imaging = load_kind("sd1")
    expected = stock(bundle, "sd1")(
        prompt="red circle",
        negative_prompt="blue",
        num_inference_steps=5,
        guidance_scale=guidance,
        height=24,
        width=16,
        generator=torch.Generator().manual_seed(7),
        output_type="latent",
    ).images
    request = ImageRequest(
        "red circle", "blue", seed=7, num_inference_steps=5, guidance_scale=guidance, height=24, width=16
    )
    torch.testing.assert_close(latents(imaging, request), expected, **STOCK)


def test_an_ip_adapter_makes_what_diffusers_makes(load_kind: Load) -> None:
    bundle, imaging = load_kind("ip-adapter")
    pipe = stock(bundle, "ip-adapter")
    pipe.load_ip_adapter(
        str(bundle.path / "diffusion"),
        subfolder="ip_adapter",
        weight_name="adapter.safetensors",
        image_encoder_folder=None,
    )
    embedding = imaging.embed_image(picture(bundle))
    e = torch.from_numpy(embedding.unit)[None, None] * embedding.norm
    expected = pipe(
        prompt="red circle",
        ip_adapter_image_embeds=[torch.cat([torch.zeros_like(e), e])],
        num_inference_steps=4,
        guidance_scale=3.0,
        height=16,
        width=16,
        generator=torch.Generator().manual_seed(7),
        output_type="latent",
    ).images
    ours = latents(imaging, ImageRequest("red circle", image=picture(bundle), seed=7))
    torch.testing.assert_close(ours, expected, **STOCK)


def test_pictures_are_decoded_as_diffusers_decodes_them(load_kind: Load) -> None:
    bundle, imaging = load_kind("sd1")
    request = ImageRequest("red circle", seed=7)
    pipe = stock(bundle, "sd1")
    z = latents(imaging, request)
    with torch.inference_mode():
        expected = pipe.image_processor.postprocess(
            pipe.vae.decode(z / pipe.vae.config.scaling_factor, return_dict=False)[0]
        )[0]
    (ours,) = imaging.generate([request])
    # One step of 255: rounding of numbers that differ in their last bits.
    assert np.abs(np.asarray(ours.image).astype(int) - np.asarray(expected).astype(int)).max() <= 1


@pytest.mark.parametrize("kind", ["unclip", "sd1", "ip-adapter"])
def test_each_kind_is_steered_through_its_path(load_kind: Load, kind: Any) -> None:
    bundle, imaging = load_kind(kind)
    assert imaging.entry.conditioning in imaging.paths
    image = picture(bundle) if kind == "ip-adapter" else None
    plain = ImageRequest("red circle", image=image, seed=1)
    steered = replace(plain, steering=Steering(EDITS))
    made = imaging.generate([plain, steered])
    assert made[0].delta == 0.0
    assert made[1].delta > 0.01
    assert made[0].image.tobytes() != made[1].image.tobytes()


@pytest.mark.parametrize("kind", ["unclip", "sd1", "ip-adapter"])
@pytest.mark.parametrize("operation", ["scale", "quantile", "reference"])
@pytest.mark.parametrize("guidance", ["conditional", "contrastive"])
def test_strength_zero_is_the_unsteered_image_byte_for_byte(
    load_kind: Load, kind: Any, operation: str, guidance: Any
) -> None:
    bundle, imaging = load_kind(kind)
    made = {
        "scale": Scale(3.0),
        "quantile": SetQuantile(0.9),
        "reference": FromReference(image=picture(bundle, 1)),
    }
    plain = ImageRequest("red circle", image=picture(bundle) if kind == "ip-adapter" else None, seed=1)
    edit = Edit(Label.IMAGE, made[operation], strength=0.0)
    steered = replace(plain, steering=Steering((edit,), guidance=guidance))
    first, second = pixels(imaging, plain, steered)
    assert first == second


@pytest.mark.parametrize("kind", ["unclip", "sd1"])
def test_contrastive_guidance_changes_the_other_side_too(load_kind: Load, kind: Any) -> None:
    _, imaging = load_kind(kind)
    requests = [
        ImageRequest("red circle", seed=1, steering=Steering(EDITS, guidance=guidance))
        for guidance in ("conditional", "contrastive")
    ]
    conditionings = [imaging.condition(request) for request in requests]
    assert conditionings[0].delta == conditionings[1].delta
    for field in ("hidden", "embedding"):
        one, other = (getattr(c, field) for c in conditionings)
        if one is not None and (field == "embedding") == (kind == "unclip"):
            assert torch.equal(one[1], other[1])
            assert not torch.equal(one[0], other[0])
    assert len(set(pixels(imaging, *requests))) == 2


def test_contrastive_guidance_subtracts_null_and_the_opposite_change(load_kind: Load) -> None:
    _, imaging = load_kind("unclip")
    plain = ImageRequest("red circle", seed=1)
    null = imaging.prepare(plain).class_labels
    assert null is not None
    d = null.shape[1] // 2
    for delta in (1e-4, 0.3):
        steering = Steering(EDITS, guidance="contrastive", delta=delta)
        sample = imaging.prepare(replace(plain, steering=steering))
        steered, labels = sample.conditioning.steered, sample.class_labels
        assert steered is not None
        assert labels is not None
        e = imaging.embed_text("red circle")
        change = torch.from_numpy(steered.unit - e.unit) * e.norm
        # The null row tells no noise level and has no noise: only the change is added to it.
        torch.testing.assert_close(labels[0], torch.cat([-change, torch.zeros(d)]))
        assert float((labels[0] - null[0]).norm()) == pytest.approx(delta * e.norm, rel=1e-2)


def test_the_words_of_a_prompt_fade_as_the_dose_grows(load_kind: Load) -> None:
    bundle, imaging = load_kind("unclip")
    fingerprint, d = bundle.manifest.clip.fingerprint, bundle.clip_config.embed_dim
    plain, empty = (imaging.condition(ImageRequest(text)).hidden[1] for text in ("red circle", ""))
    try:
        imaging.know(make_attributes(fingerprint, d, fade=0.2))
        for dose, share in ((0.0, 0.0), (0.05, 0.25), (0.2, 1.0), (0.3, 1.0)):
            made = imaging.condition(ImageRequest("red circle", steering=Steering(EDITS, dose=dose)))
            torch.testing.assert_close(made.hidden[1], torch.lerp(plain, empty, share), atol=2e-3, rtol=0)
            assert imaging.dose(made) == pytest.approx(dose, rel=1e-3)
            # An attribute leaves the words: they keep the thing what it is.
            turned = Steering(attributes=(AttributeEdit("blue"),), dose=dose)
            made = imaging.condition(ImageRequest("red circle", steering=turned))
            assert torch.equal(made.hidden[1], plain)
            assert imaging.dose(made) == pytest.approx(dose, rel=1e-3)
        imaging.know(make_attributes(fingerprint, d, fade=0.0))
        kept = imaging.condition(ImageRequest("red circle", steering=Steering(EDITS, dose=0.3)))
        assert torch.equal(kept.hidden[1], plain)
    finally:
        imaging.know(None)
    assert imaging.dose(imaging.condition(ImageRequest("red circle", steering=Steering(EDITS)))) is None


def test_the_prompt_path_moves_the_projected_embedding_by_what_the_edit_asks(load_kind: Load) -> None:
    _, imaging = load_kind("sd1")
    prompt = "red circle"
    plain = imaging.condition(ImageRequest(prompt))
    steered = imaging.condition(ImageRequest(prompt, steering=Steering(EDITS, delta=0.1)))
    assert torch.equal(plain.hidden[0], steered.hidden[0])
    changed = (plain.hidden[1] != steered.hidden[1]).any(dim=1)
    end = int(changed.float().argmax())
    # The start token and the words stay; the end token and all padding move, and keep their norms.
    assert end == 3
    assert changed[end:].all()
    torch.testing.assert_close(plain.hidden.norm(dim=-1), steered.hidden.norm(dim=-1))
    projection = imaging._embedder.projection
    assert projection is not None
    e = imaging.embed_text(prompt)
    wanted = torch.from_numpy(steered.steered.unit - e.unit) * e.norm  # type: ignore[union-attr]
    got = projection @ (steered.hidden[1, end] - plain.hidden[1, end])
    # Giving the token its norm back shrinks the change a little; its direction is what counts.
    assert float(torch.nn.functional.cosine_similarity(wanted, got, dim=0)) > 0.95


def test_a_penultimate_layer_is_refused_with_its_reason(load_kind: Load) -> None:
    _, imaging = load_kind("sd2")
    assert imaging.paths == ()
    assert len(pixels(imaging, ImageRequest("red circle"))) == 1
    with pytest.raises(SteeringUnsupported, match="penultimate") as caught:
        imaging.condition(ImageRequest("red circle", steering=Steering(EDITS)))
    assert caught.value.reason == "STEERING_PATH_UNSUPPORTED"


def test_a_path_that_the_pipeline_lacks_is_refused(load_kind: Load) -> None:
    _, imaging = load_kind("sd1")
    with pytest.raises(SteeringUnsupported, match="takes no embedding"):
        imaging.condition(ImageRequest("red circle", steering=Steering(EDITS, path="embedding")))


def test_a_dictionary_of_another_tower_is_refused_but_the_pipeline_still_draws(
    tiny: Bundle, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(tiny.path, tmp_path / "other"))
    bundle = add_tiny_pipeline(Bundle.load(path), "sd1", tower_fingerprint="0" * 64)
    imaging = Imaging.load(bundle, threads=1, max_batch=1)
    assert len(pixels(imaging, ImageRequest("red circle"))) == 1
    with pytest.raises(SteeringUnsupported, match="another tower") as caught:
        imaging.condition(ImageRequest("red circle", steering=Steering(EDITS)))
    assert caught.value.reason == "STEERING_TOWER_MISMATCH"


def test_a_text_encoder_that_is_not_the_tower_cannot_carry_edits(tiny: Bundle, tmp_path: Path) -> None:
    path = Path(shutil.copytree(tiny.path, tmp_path / "other"))
    bundle = add_tiny_pipeline(Bundle.load(path), "sd1")
    weights = bundle.path / "diffusion/text_encoder/model.safetensors"
    import safetensors.torch

    state = safetensors.torch.load_file(str(weights))
    safetensors.torch.save_file(
        {name: torch.randn_like(value) * 0.1 for name, value in state.items()}, str(weights), {"format": "pt"}
    )
    refresh_manifest(path)
    imaging = Imaging.load(Bundle.load(path), threads=1, max_batch=1)
    with pytest.raises(SteeringUnsupported, match="not the bundle's text tower"):
        imaging.condition(ImageRequest("red circle", steering=Steering(EDITS)))


def test_an_embedding_without_a_reference_is_the_prompts_own_or_none(load_kind: Load) -> None:
    _, unclip = load_kind("unclip")
    embedding = unclip.condition(ImageRequest("red circle")).embedding
    e = unclip.embed_text("red circle")
    assert embedding is not None
    torch.testing.assert_close(embedding[1], torch.from_numpy(e.unit * e.norm))
    _, adapter = load_kind("ip-adapter")
    none = adapter.condition(ImageRequest("red circle"))
    assert none.embedding is not None
    assert not none.embedding.any()
    with pytest.raises(InvalidInput, match="give one") as caught:
        adapter.condition(ImageRequest("red circle", steering=Steering(EDITS)))
    assert caught.value.violations[0][0] == "image"


def test_the_null_side_of_guidance_has_no_embedding_and_no_noise_level(load_kind: Load) -> None:
    _, imaging = load_kind("unclip")
    labels = imaging.prepare(ImageRequest("red circle")).class_labels
    assert labels is not None
    assert not labels[0].any()
    assert labels[1].any()


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (ImageRequest("x", height=21), "height"),
        (ImageRequest("x", width=640), "width"),
        (ImageRequest("x", num_inference_steps=51), "num_inference_steps"),
        (ImageRequest("x", seed=-1), "seed"),
        (ImageRequest("x", image=b"no picture"), "image.data"),
        (ImageRequest("word " * 100), "prompt"),
        (ImageRequest("x", "word " * 100), "negative_prompt"),
        (ImageRequest("x", steering=Steering((Edit((64,), Scale(0)),))), "steering.edits[0].ids"),
        (ImageRequest("x", steering=Steering((Edit((0,), Scale(0), 5.0),))), "steering.edits[0].strength"),
        (ImageRequest("x", steering=Steering(EDITS, dictionary="none")), "steering.dictionary"),
        (
            ImageRequest("x", steering=Steering((Edit((0,), FromReference(image=b"x")),))),
            "steering.edits[0].reference.image.data",
        ),
    ],
)
def test_a_bad_request_names_its_field(load_kind: Load, request_: ImageRequest, field: str) -> None:
    _, imaging = load_kind("unclip")
    with pytest.raises(InvalidInput) as caught:
        imaging.condition(request_)
    assert caught.value.violations[0][0].startswith(field)


def test_a_long_prompt_is_cut_where_the_request_allows_it(load_kind: Load) -> None:
    _, imaging = load_kind("unclip")
    with pytest.raises(TextTooLong):
        imaging.condition(ImageRequest("word " * 100))
    assert imaging.condition(ImageRequest("word " * 100, truncate=True)).hidden.shape[0] == 2


def test_a_prompt_that_only_the_text_tower_refuses_is_named_as_the_request_has_it(load_kind: Load) -> None:
    bundle, _ = load_kind("sd1")
    imaging = Imaging.load(bundle, threads=1, text_limits=TextLimits(12))
    with pytest.raises(TextTooLong) as caught:
        imaging.condition(ImageRequest("a red heart again", steering=Steering(EDITS)))
    assert [path for path, *_ in caught.value.violations] == ["prompt"]


def test_a_bundle_without_a_pipeline_says_so(tiny: Bundle) -> None:
    with pytest.raises(NoPipeline):
        Imaging.load(tiny)


def test_pickled_weights_are_refused_wherever_they_lie(load_kind: Load, tmp_path: Path) -> None:
    bundle, imaging = load_kind("sd1")
    folder = Path(shutil.copytree(bundle.path / "diffusion", tmp_path / "diffusion"))
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(UnsafeWeights):
        load_parts(folder, imaging.entry)
    copied = Path(shutil.copytree(bundle.path, tmp_path / "bundle"))
    (copied / "diffusion/unet/extra.ckpt").write_bytes(b"x")
    with pytest.raises(UnsafeWeights):
        Bundle.load(copied)


@pytest.mark.parametrize(
    ("change", "kind", "match"),
    [
        ({"pipeline": "StableDiffusionXLPipeline"}, UnsupportedModel, "must be one of"),
        ({"pipeline": "StableUnCLIPImg2ImgPipeline"}, ManifestError, "holds a"),
        ({"conditioning": "embedding"}, ManifestError, "IP-Adapter only"),
        ({"scheduler": "EvilScheduler"}, UnsupportedModel, "EvilScheduler"),
        ({"height": 20}, ManifestError, "multiples of 8"),
        ({"num_inference_steps": 60}, ManifestError, "num_inference_steps"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(
    load_kind: Load, change: dict[str, Any], kind: type[Exception], match: str
) -> None:
    bundle, imaging = load_kind("sd1")
    with pytest.raises(kind, match=match):
        load_parts(bundle.path / "diffusion", replace(imaging.entry, **change))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"path": "/elsewhere"}, "path"),
        ({"path": "../diffusion"}, "path"),
        ({"path": "diffusion/../../x"}, "path"),
        ({"path": "samples"}, "path"),
        ({"ip_adapter": "../../x.safetensors"}, "ip_adapter"),
        ({"ip_adapter": "/x.safetensors"}, "ip_adapter"),
        ({"ip_adapter": "missing.safetensors"}, "ip_adapter"),
        ({"ip_adapter": "../x.safetensors", "reference": "/pipeline", "sha256": "0" * 64}, "ip_adapter"),
    ],
)
def test_a_manifest_whose_pipeline_leads_out_of_the_bundle_is_refused(
    load_kind: Load, change: dict[str, Any], key: str
) -> None:
    bundle, _ = load_kind("ip-adapter")
    document = json.loads((bundle.path / MANIFEST_NAME).read_text())
    assert parse_manifest(json.dumps(document)).diffusion == bundle.manifest.diffusion
    document["diffusion"].update(change)
    with pytest.raises(ManifestError) as caught:
        parse_manifest(json.dumps(document))
    assert f"diffusion.{key}" in [path for path, *_ in caught.value.violations]


def test_another_scheduler_is_built_from_the_same_config(load_kind: Load) -> None:
    bundle, imaging = load_kind("sd1")
    parts = load_parts(bundle.path / "diffusion", replace(imaging.entry, scheduler="EulerDiscreteScheduler"))
    assert type(parts.scheduler).__name__ == "EulerDiscreteScheduler"
    assert parts.scheduler.config.prediction_type == "v_prediction"


def test_weights_outside_the_bundle_are_taken_by_hash(load_kind: Load, tmp_path: Path) -> None:
    bundle, imaging = load_kind("sd1")
    folder = Path(shutil.copytree(bundle.path / "diffusion", tmp_path / "elsewhere"))
    entry = replace(imaging.entry, reference=str(folder), sha256=folder_sha256(folder))
    assert pipeline_folder(bundle.path, entry) == folder
    with pytest.raises(ManifestError, match="hash"):
        pipeline_folder(bundle.path, replace(entry, sha256=None))
    with pytest.raises(ManifestError, match="revision"):
        pipeline_folder(bundle.path, replace(entry, reference="hf-hub:owner/name"))
    unet = (folder / "unet").rename(tmp_path / "unet")
    (folder / "unet").symlink_to(unet)
    with pytest.raises(BundleFileError, match="a link"):
        pipeline_folder(bundle.path, entry)
    (folder / "unet").unlink()
    unet.rename(folder / "unet")
    (folder / "scheduler/scheduler_config.json").write_text("{}")
    with pytest.raises(BundleFileError, match="not the one"):
        pipeline_folder(bundle.path, entry)
    with pytest.raises(BundleFileError, match="not there"):
        pipeline_folder(bundle.path, replace(entry, reference=str(tmp_path / "nowhere")))


def test_a_refusal_keeps_nothing_of_the_requests_that_it_ended(load_kind: Load) -> None:
    bundle, imaging = load_kind("sd1")
    request = ImageRequest("red circle", steering=Steering(EDITS, path="embedding"))
    raised = []
    for _ in range(2):
        with pytest.raises(SteeringUnsupported) as caught:
            imaging.condition(request)
        raised.append(caught.value)
    assert raised[0] is not raised[1]
    assert str(raised[0]) == str(raised[1]) and raised[0].reason == "STEERING_PATH_UNSUPPORTED"
    assert all(why is None or why.__traceback__ is None for why in imaging._condition.refusals.values())
