"""What the fake computes and knows: no weights, no files, the same everywhere."""

from __future__ import annotations

import hashlib
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
from google.protobuf import duration_pb2

from monofacet.testing._status import abort
from monofacet.v1 import bias_service_pb2, common_pb2, modality_service_pb2, model_service_pb2

BUNDLE = "fake@000000000000"
DICTIONARY = "fake-sae"
EMBED_DIM = 8
N_FEATURES = 20
LABELS = (
    common_pb2.MODALITY_LABEL_IMAGE,
    common_pb2.MODALITY_LABEL_TEXT,
    common_pb2.MODALITY_LABEL_CROSS,
    common_pb2.MODALITY_LABEL_UNRESOLVED,
    common_pb2.MODALITY_LABEL_DEAD,
)
# One white pixel, as PNG.
THUMBNAIL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c63f8ffff3f0005fe02"
    "fe0def46b80000000049454e44ae426082"
)


class FakeModel:
    """A model of 8 dimensions and 20 features; override a method to change what the fake answers."""

    def check_bundle(self, bundle: str, context: Any) -> None:
        """End the call unless it asks for the one bundle that there is.

        Parameters
        ----------
        bundle
            As the request names it.
        context
            Of the call.
        """
        if bundle not in ("", BUNDLE.partition("@")[0], BUNDLE):
            message = f"no bundle {bundle!r}; this server serves {BUNDLE}"
            abort(
                context,
                grpc.StatusCode.NOT_FOUND,
                message,
                reason="UNKNOWN_MODEL",
                violations={"bundle": message},
            )

    def embed(self, item: common_pb2.Input) -> npt.NDArray[np.float32]:
        """Embed an input.

        Parameters
        ----------
        item
            A text or an image.

        Returns
        -------
        ndarray of float32, shape [8]
            Not normalised.
        """
        content = item.text.encode() if item.WhichOneof("input") == "text" else item.image.data
        seed = int.from_bytes(hashlib.sha256(content).digest()[:8], "little")
        return np.random.default_rng(seed).standard_normal(EMBED_DIM).astype(np.float32)

    def activations(self, embedding: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Find the features of an embedding.

        Parameters
        ----------
        embedding
            Of length 1, shape [8].

        Returns
        -------
        ndarray of float32, shape [20]
            At least 0.
        """
        decoder = np.random.default_rng(0).standard_normal((N_FEATURES, EMBED_DIM)).astype(np.float32)
        rows = decoder / np.linalg.norm(decoder, axis=1, keepdims=True)
        z: npt.NDArray[np.float32] = np.maximum(rows @ embedding, 0)
        # The dead features of the cards do not fire.
        z[LABELS.index(common_pb2.MODALITY_LABEL_DEAD) :: len(LABELS)] = 0
        return z

    def card(self, feature: int) -> modality_service_pb2.FeatureCard:
        """Describe a feature.

        Parameters
        ----------
        feature
            In [0, 20).

        Returns
        -------
        FeatureCard
            With its labels going round; dead ones have no measures.
        """
        label = LABELS[feature % len(LABELS)]
        card = modality_service_pb2.FeatureCard(feature=feature, label=label, name=f"concept {feature}")
        card.label_reason = "nothing that it was scored on activates it"
        if label != common_pb2.MODALITY_LABEL_DEAD:
            share = {LABELS[0]: 0.95, LABELS[1]: 0.05}.get(label, 0.5)
            card.mds_energy, card.mds_energy_low, card.mds_energy_high = share, share - 0.03, share + 0.03
            card.mds_paper, card.paper_label, card.paper_pairs = share, label, 100
            card.coactivation, card.coactivation_p, card.coactivation_q = 0.5, 0.001, 0.01
            card.coactivation_significant = label == common_pb2.MODALITY_LABEL_CROSS
            card.firing_rate_image, card.firing_rate_text = share * 0.1, (1 - share) * 0.1
            card.energy_image, card.energy_text = share, 1 - share
            card.name_auc, card.name_auc_low, card.name_auc_high, card.name_count = 0.9, 0.8, 0.95, 12
            interval = f"[{card.mds_energy_low:.0%}, {card.mds_energy_high:.0%}]"
            card.label_reason = f"{share:.0%} of its energy comes from pictures {interval}"
        return card

    def model(self) -> model_service_pb2.Model:
        """Describe the bundle.

        Returns
        -------
        Model
            Complete, without files.
        """
        limits = model_service_pb2.Limits(
            max_inputs=256,
            max_request_bytes=32 * 1024 * 1024,
            max_response_bytes=64 * 1024 * 1024,
            max_image_bytes=16 * 1024 * 1024,
            max_image_pixels=40_000_000,
            image_formats=["PNG", "JPEG", "WEBP"],
            max_text_bytes=65536,
            max_queued_inputs=1024,
            max_stream_in_flight=64,
            max_score_pairs=10_000,
            max_page_size=1000,
            max_call_duration=duration_pb2.Duration(seconds=300),
            max_concurrent_calls=256,
            min_image_side=4,
            max_image_aspect_ratio=32,
            max_audit_items=20_000,
            max_images=16,
            max_queued_images=64,
        )
        tower = model_service_pb2.Tower(
            architecture="fake",
            embed_dim=EMBED_DIM,
            image_size=16,
            context_length=77,
            logit_scale=100,
            parameters=1,
            fingerprint="0" * 64,
        )
        dictionary = model_service_pb2.DictionaryInfo(
            name=DICTIONARY,
            kind="sae",
            n_features=N_FEATURES,
            embed_dim=EMBED_DIM,
            l0=4,
            is_default=True,
            has_modality=True,
            has_cards=True,
            sha256="0" * 64,
            metrics={"fvu": 0.04},
        )
        return model_service_pb2.Model(
            bundle=BUNDLE,
            name="fake",
            description="A deterministic stand-in.",
            sha256="0" * 64,
            licences=["Apache-2.0"],
            tower=tower,
            dictionaries=[dictionary],
            runtime=model_service_pb2.Runtime(
                backend="torch", device="cpu", precision="fp32", threads=1, replicas=1
            ),
            limits=limits,
            metrics={"image_to_text_recall_at_1": 0.5},
            is_default=True,
            recommended_ablation=bias_service_pb2.Ablation(
                dictionary=DICTIONARY, top_gender_features=4, mode=bias_service_pb2.ABLATION_MODE_PROJECT
            ),
            pipeline=model_service_pb2.Pipeline(
                kind="StableUnCLIPImg2ImgPipeline",
                paths=["embedding", "prompt"],
                height=64,
                width=64,
                max_height=64,
                max_width=64,
                num_inference_steps=4,
                max_inference_steps=50,
                guidance_scale=3.0,
                embedding_from_prompt=True,
                takes_image=True,
                ready=True,
            ),
        )
