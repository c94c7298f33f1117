"""ModelService: what is served, on what, and within which limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from monofacet.v1 import model_service_pb2 as pb
from monofacet.v1 import model_service_pb2_grpc

from deployments.encoder.tasks import EncoderInfo
from deployments.gateway.bundles import Backend, Bundles
from deployments.gateway.catalogue import Catalogue
from deployments.gateway.compute.ablation import recommended
from deployments.gateway.encoder_client import EncoderClient
from deployments.gateway.messages import duration, timings
from deployments.generator.events import GeneratorInfo
from deployments.operations.settings import Settings


def server_version() -> str:
    """Return the installed server's version, or `0` when it runs from a bare checkout."""
    try:
        return version("monofacet-server")
    except PackageNotFoundError:
        return "0"


def flat_metrics(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the numbers of a nested record by dotted name; what is not a number is left out."""
    flat: dict[str, float] = {}
    for key, value in metrics.items():
        if isinstance(value, Mapping):
            flat |= flat_metrics(value, f"{prefix}{key}.")
        elif isinstance(value, int | float):
            flat[f"{prefix}{key}"] = float(value)
    return flat


def limits(settings: Settings) -> pb.Limits:
    """Return every limit in force."""
    return pb.Limits(
        max_inputs=settings.max_items,
        max_request_bytes=settings.max_request_bytes,
        max_response_bytes=settings.max_response_bytes,
        max_image_bytes=settings.max_image_bytes,
        max_image_pixels=settings.max_image_pixels,
        image_formats=["PNG", "JPEG", "WEBP"],
        max_text_bytes=settings.max_text_bytes,
        max_queued_inputs=settings.max_queued_items,
        max_stream_in_flight=settings.stream_window,
        max_score_pairs=settings.max_score_pairs,
        max_audit_items=settings.max_audit_items,
        max_page_size=settings.max_page_size,
        max_call_duration=duration(settings.max_call_s),
        max_concurrent_calls=settings.max_concurrent_calls,
        min_image_side=settings.min_image_side,
        max_image_aspect_ratio=settings.max_image_aspect_ratio,
        max_images=settings.max_images,
        max_queued_images=settings.max_queued_images,
    )


def _dictionaries(catalogue: Catalogue) -> list[pb.DictionaryInfo]:
    manifest = catalogue.bundle.manifest
    infos = []
    for name, entry in sorted(manifest.dictionaries.items()):
        metrics = flat_metrics(catalogue.bundle.metrics(name))
        infos.append(
            pb.DictionaryInfo(
                name=name,
                # A recipe such as sae-group shares its form on disk with another; the recipe is what a caller knows.
                kind=str(entry.training.get("recipe") or entry.kind),
                n_features=entry.n_features,
                embed_dim=entry.embed_dim,
                l0=metrics.get("l0", metrics.get("l0_image")),
                is_default=name == manifest.default_dictionary,
                has_modality=name in manifest.modality,
                has_cards=name in manifest.cards.tables,
                sha256=manifest.files[entry.weights].sha256 if entry.weights else "",
                metrics=metrics,
            )
        )
    return infos


def model(catalogue: Catalogue, info: EncoderInfo, settings: Settings) -> pb.Model:
    """Describe a bundle that is served; without its files, and without its replicas, which come and go."""
    bundle = catalogue.bundle
    manifest = bundle.manifest
    metrics = {key: value for key, value in manifest.metrics.items() if key != "dictionaries"}
    return pb.Model(
        bundle=bundle.id,
        name=manifest.name,
        description=manifest.description,
        sha256=bundle.sha256,
        licences=sorted({licence.name for licence in manifest.licences}),
        tower=pb.Tower(
            architecture=str(manifest.provenance.get("architecture", "")) or "CLIP",
            embed_dim=info.embed_dim,
            image_size=info.image_size,
            context_length=info.context_length,
            logit_scale=info.logit_scale,
            parameters=info.parameters,
            fingerprint=manifest.clip.fingerprint,
        ),
        dictionaries=_dictionaries(catalogue),
        runtime=pb.Runtime(
            backend=info.backend,
            device=info.device,
            precision=info.precision,
            threads=info.threads,
        ),
        limits=limits(settings),
        metrics=flat_metrics(metrics),
        recommended_ablation=recommended(catalogue),
    )


def pipeline(catalogue: Catalogue, info: GeneratorInfo | None) -> pb.Pipeline | None:
    """Describe the text-to-image pipeline; `info` is there once it is warm."""
    entry = catalogue.bundle.manifest.diffusion
    if entry is None:
        return None
    return pb.Pipeline(
        kind=entry.pipeline,
        paths=() if info is None else info.paths,
        height=entry.height,
        width=entry.width,
        max_height=entry.max_height or entry.height,
        max_width=entry.max_width or entry.width,
        num_inference_steps=entry.num_inference_steps,
        max_inference_steps=entry.max_inference_steps,
        guidance_scale=entry.guidance_scale,
        embedding_from_prompt=entry.embedding_from_prompt,
        takes_image=entry.pipeline == "StableUnCLIPImg2ImgPipeline" or entry.ip_adapter is not None,
        ready=info is not None,
    )


class ModelServicer(model_service_pb2_grpc.ModelServiceServicer):
    """Answers ModelService.

    Parameters
    ----------
    bundles
        What is served.
    backends
        What computes for each, in the order of `bundles`.
    encoders
        The clients of their encoders, in the same order.
    settings
        Of the server.
    """

    def __init__(
        self,
        bundles: Bundles,
        backends: Sequence[Backend],
        encoders: Sequence[EncoderClient],
        settings: Settings,
    ) -> None:
        self._bundles = bundles
        self._encoders = dict(zip(bundles, encoders, strict=True))
        self._models = {
            name: model(bundles[name], backend.info, settings)
            for name, backend in zip(bundles, backends, strict=True)
        }
        self._models[bundles.default].is_default = True
        self._version = server_version()
        self._default = bundles[bundles.default].bundle.id
        for name in bundles:
            self.set_generator(name, None)

    def set_generator(self, bundle: str, info: GeneratorInfo | None) -> None:
        """Learn what the generator of a bundle runs on, once it is warm; None before."""
        described = pipeline(self._bundles[bundle], info)
        if described is not None:
            self._models[bundle].pipeline.CopyFrom(described)

    def _described(self, name: str) -> pb.Model:
        """Return what is known of a bundle, with the replicas of now."""
        described = self._models[name]
        described.runtime.replicas = self._encoders[name].replicas
        return described

    async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:  # noqa: N802
        """Describe one bundle, with its files."""
        name = self._bundles.resolve(request.bundle)
        described = pb.Model()
        described.CopyFrom(self._described(name))
        for path, entry in sorted(self._bundles[name].bundle.manifest.files.items()):
            described.files.add(path=path, sha256=entry.sha256, bytes=entry.bytes)
        return pb.GetModelResponse(
            model=described, server_version=self._version, timings=timings(), bundle=self._default
        )

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:  # noqa: N802
        """Describe every bundle, the default first."""
        return pb.ListModelsResponse(
            models=map(self._described, self._models),
            server_version=self._version,
            timings=timings(),
            bundle=self._default,
        )
