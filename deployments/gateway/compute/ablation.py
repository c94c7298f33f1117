"""From the contract's Ablation to arrays that remove features, resolved against the bundle's bias calibration."""

from __future__ import annotations

import asyncio
import re
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from monofacet.v1 import bias_service_pb2 as pb
from monofacet.v1 import common_pb2
from numpy.typing import NDArray

from deployments.gateway.cards import label_name
from deployments.gateway.catalogue import Catalogue
from deployments.gateway.compute.decoders import Decoders
from services.bias.ablation import Mode, Side
from services.bias.calibration import BiasCalibration
from services.bias.plan import Plan
from services.errors import InvalidInput, NotCalibrated, UnknownFeature
from services.modality.modalities import Modality

MODES = {
    pb.ABLATION_MODE_UNSPECIFIED: Mode.ZERO,
    pb.ABLATION_MODE_ZERO: Mode.ZERO,
    pb.ABLATION_MODE_MEAN: Mode.MEAN,
    pb.ABLATION_MODE_PROJECT: Mode.PROJECT,
    pb.ABLATION_MODE_LEACE: Mode.LEACE,
}
# As the study names those of its methods that use features.
ABLATION_NAME = re.compile(r"(?:top ([1-9]\d*)|label (IMAGE|TEXT|CROSS)), (zero|mean|project)")
# Resolved ablations that are kept: a projection's basis takes longer to find than a call.
KEPT = 64


@dataclass(frozen=True)
class Resolved:
    """An ablation that can be applied.

    Attributes
    ----------
    message
        As asked, with the dictionary's full name and the mode filled in.
    plan
        What removes the features.
    sides
        The dictionary in both modalities.
    """

    message: pb.Ablation
    plan: Plan
    sides: dict[Modality, Side]

    @property
    def set_size(self) -> int:
        """Features in the set; 0 for LEACE."""
        return 0 if self.plan.features is None else len(self.plan.features)


def read_calibration(catalogue: Catalogue) -> BiasCalibration | None:
    """Read the bundle's bias calibration; None where it has none."""
    entry, folder = catalogue.bundle.manifest.bias, catalogue.bundle.path
    return None if entry is None else BiasCalibration.read(folder / entry.config, folder / entry.weights)


def recommended(catalogue: Catalogue) -> pb.Ablation | None:
    """Return the ablation that the bundle's own study chose; None where it chose none that a request can ask for."""
    calibration = read_calibration(catalogue)
    if calibration is None:
        return None
    dictionary, chosen = (str(calibration.metrics.get(key, "")) for key in ("dictionary", "chosen"))
    if dictionary not in calibration.dictionaries:
        return None
    if chosen == "LEACE":
        return pb.Ablation(dictionary=dictionary, mode=pb.ABLATION_MODE_LEACE)
    named = ABLATION_NAME.fullmatch(chosen)
    if named is None:
        return None
    top, label, mode = named.groups()
    result = pb.Ablation(dictionary=dictionary, mode=pb.AblationMode.Value(f"ABLATION_MODE_{mode.upper()}"))
    if top:
        result.top_gender_features = int(top)
    else:
        result.label = common_pb2.ModalityLabel.Value(f"MODALITY_LABEL_{label}")
    return result


class Ablations:
    """Resolves ablations, and keeps the latest.

    Parameters
    ----------
    catalogue
        Labels of features.
    decoders
        Rows of the dictionaries.
    """

    def __init__(self, catalogue: Catalogue, decoders: Decoders) -> None:
        self._catalogue = catalogue
        self._decoders = decoders
        self._calibration = read_calibration(catalogue)
        self._kept: OrderedDict[bytes, Resolved] = OrderedDict()

    @property
    def calibration(self) -> BiasCalibration:
        """The bundle's bias calibration.

        Raises
        ------
        NotCalibrated
            Where it has none.
        """
        if self._calibration is None:
            raise NotCalibrated("this bundle has no bias calibration")
        return self._calibration

    async def resolve(self, asked: pb.Ablation, path: str) -> Resolved:
        """Return what `asked` means.

        Parameters
        ----------
        asked
            Keeps the contract's rules.
        path
            Of the ablation in the request, for errors.

        Raises
        ------
        NotCalibrated
            Where the bundle, or the dictionary, has no bias calibration.
        UnknownDictionary, UnknownFeature, InvalidInput
            Blaming fields under `path`.
        """
        calibration = self.calibration
        message = pb.Ablation()
        message.CopyFrom(asked)
        message.dictionary = self._catalogue.resolve(asked.dictionary, f"{path}.dictionary")
        message.mode = message.mode or pb.ABLATION_MODE_ZERO
        check_selection(message, path)
        key = message.SerializeToString(deterministic=True)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        if message.dictionary not in calibration.dictionaries:
            raise NotCalibrated(f"this bundle has no bias calibration of {message.dictionary}")
        decoders = await self._decoders.get(message.dictionary)
        known = calibration.dictionaries[message.dictionary]
        sides = {m: Side(decoder.rows, known.sides[m].means) for m, decoder in decoders.items()}
        mode = MODES[message.mode]
        if mode is Mode.LEACE:
            plan = Plan(mode, calibration.leace)
        else:
            features = self._features(message, known.rank, path)
            # A basis of many rows takes a fraction of a second, in which other calls must go on.
            plan = await asyncio.to_thread(Plan.of_features, sides, features, mode)
        resolved = Resolved(message, plan, sides)
        self._kept[key] = resolved
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return resolved

    def _features(self, message: pb.Ablation, rank: NDArray[np.int32], path: str) -> NDArray[np.int64]:
        selection = message.WhichOneof("selection")
        if selection == "label":
            _, table = self._catalogue.table(message.dictionary, f"{path}.dictionary")
            features = np.flatnonzero(table.label == label_name(message.label))
            if not len(features):
                what = f"no feature of {message.dictionary!r} is labelled {label_name(message.label)}"
                raise InvalidInput(what, [(f"{path}.label", what)])
            return features
        if selection == "top_gender_features":
            return np.sort(rank[: message.top_gender_features].astype(np.int64))
        ids = np.sort(np.array(message.features.ids, np.int64))
        if ids[-1] >= len(rank):
            place = list(message.features.ids).index(int(ids[-1]))
            raise UnknownFeature.numbered(int(ids[-1]), len(rank), f"{path}.features.ids[{place}]")
        return ids


def check_selection(message: pb.Ablation, path: str) -> None:
    """Raise InvalidInput unless a selection is there, or not there for LEACE."""
    selection = message.WhichOneof("selection")
    if message.mode == pb.ABLATION_MODE_LEACE and selection is not None:
        what = "LEACE uses no features: no selection may be set"
        raise InvalidInput(what, [(f"{path}.{selection}", what)])
    if message.mode != pb.ABLATION_MODE_LEACE and selection is None:
        what = "one of features, label and top_gender_features must be set"
        raise InvalidInput(what, [(path, what)])
