"""From gender calls to the contract's requests. Pure: no channel is touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from monofacet import _exceptions as exceptions
from monofacet._inputs import MAX_REQUEST_BYTES, Input, sendable, to_input
from monofacet._requests import enum_value, label_value, set_given, settings_given
from monofacet._types import Ablation, AblationMode, AuditSettings, Gender
from monofacet._types.brief import Brief
from monofacet.v1 import bias_service_pb2, common_pb2

__all__ = ["ItemBatcher", "LabelledItem", "ablation_message", "audit_settings", "classify_gender"]


@dataclass(frozen=True, slots=True, repr=False)
class LabelledItem(Brief):
    """An input with what is known of it.

    Attributes
    ----------
    input
        A text or an image, as `encode` takes them.
    gender
        How the person in it is presented; None for an ungendered item, such as "police officer".
    profession
        Or another group that gaps are taken over; may be empty.
    cluster
        Items of one cluster, such as pictures of one person, are not independent; empty if it stands alone.
    id
        A name for it, for what is said of it; may be empty.
    """

    input: Input
    gender: Gender | str | None = None
    profession: str = ""
    cluster: str = ""
    id: str = ""


@sendable("the ablation")
def ablation_message(ablation: Ablation) -> bias_service_pb2.Ablation:
    """Make the contract's ablation.

    Parameters
    ----------
    ablation
        One selection, or none with LEACE.

    Returns
    -------
    bias_service_pb2.Ablation
        For a request.

    Raises
    ------
    InputError
        If mode or label is unknown, not exactly one selection is made, or it cannot be sent.
    """
    mode = enum_value(AblationMode, bias_service_pb2.AblationMode.DESCRIPTOR, ablation.mode, "mode")
    message = bias_service_pb2.Ablation(dictionary=ablation.dictionary, mode=mode)
    leace = mode == bias_service_pb2.ABLATION_MODE_LEACE
    chosen = [
        name for name in ("features", "label", "top_gender_features") if getattr(ablation, name) is not None
    ]
    if len(chosen) != (0 if leace else 1):
        wanted = "none with LEACE" if leace else "exactly one"
        raise exceptions.InputError(
            f"of features, label and top_gender_features set {wanted}, not {', '.join(chosen) or 'none'}"
        )
    if ablation.features is not None:
        try:
            message.features.ids.extend(ablation.features)
        except (TypeError, ValueError) as error:
            raise exceptions.InputError(f"features are numbers from 0: {error}") from error
    elif ablation.label is not None:
        message.label = label_value(ablation.label)
    elif ablation.top_gender_features is not None:
        if ablation.top_gender_features < 1:
            raise exceptions.InputError("top_gender_features is at least 1")
        message.top_gender_features = ablation.top_gender_features
    return message


@sendable("the request")
def classify_gender(
    inputs: Sequence[common_pb2.Input], ablation: Ablation | None, truncate: bool
) -> bias_service_pb2.ClassifyGenderRequest:
    """Make a ClassifyGender request.

    Parameters
    ----------
    inputs
        A part of the batch.
    ablation
        None for none.
    truncate
        Whether long texts are cut.

    Returns
    -------
    ClassifyGenderRequest
        For one call.

    Raises
    ------
    InputError
        If the ablation cannot be sent.
    """
    return bias_service_pb2.ClassifyGenderRequest(
        inputs=inputs,
        ablation=None if ablation is None else ablation_message(ablation),
        truncate_text=truncate,
    )


@sendable("the settings")
def audit_settings(settings: AuditSettings) -> bias_service_pb2.AuditGenderRequest:
    """Make the first message of AuditGender.

    Parameters
    ----------
    settings
        What is None stays unset.

    Returns
    -------
    AuditGenderRequest
        With the settings set.

    Raises
    ------
    InputError
        If a setting cannot be sent; the message says which.
    """
    message = bias_service_pb2.AuditSettings(
        ablations=[ablation_message(ablation) for ablation in settings.ablations],
        on_bad_item=bias_service_pb2.BAD_ITEM_POLICY_SKIP
        if settings.skip_bad_items
        else bias_service_pb2.BAD_ITEM_POLICY_FAIL,
    )
    set_given(message, settings_given(settings, "ablations", "skip_bad_items"))
    return bias_service_pb2.AuditGenderRequest(settings=message)


def with_ablations(settings: AuditSettings, recommended: Ablation | None) -> AuditSettings:
    """Fill in what is audited by default.

    Parameters
    ----------
    settings
        Without ablations.
    recommended
        By the bundle, or None.

    Returns
    -------
    AuditSettings
        With one ablation.
    """
    return replace(settings, ablations=(recommended or Ablation(top_gender_features=16),))


class ItemBatcher:
    """Gathers labelled items into messages.

    Parameters
    ----------
    batch_size
        Items a message, at most 256.
    max_bytes
        Bytes a message; a message with one item may be larger.
    """

    def __init__(self, batch_size: int = 64, max_bytes: int = MAX_REQUEST_BYTES // 4) -> None:
        self._batch_size = batch_size
        self._max_bytes = max_bytes
        self._batch = bias_service_pb2.LabelledBatch()
        self._bytes = 0
        self._taken = 0

    def add(self, item: LabelledItem) -> list[bias_service_pb2.AuditGenderRequest]:
        """Take an item.

        Parameters
        ----------
        item
            What cannot be read here ends the call, whatever the settings say of bad items.

        Returns
        -------
        list of AuditGenderRequest
            The batch before it, if it is full; else nothing.

        Raises
        ------
        InputError
            If the item cannot be sent; the message says which.
        """
        try:
            message = bias_service_pb2.LabelledItem(
                id=item.id,
                input=to_input(item.input),
                gender=gender_value(item.gender),
                profession=item.profession,
                cluster=item.cluster,
            )
        except (TypeError, ValueError) as error:
            raise exceptions.InputError(f"items[{self._taken}]: {error}") from error
        self._taken += 1
        size = message.ByteSize()
        full = len(self._batch.items) == self._batch_size or self._bytes + size > self._max_bytes
        messages = self.rest() if full else []
        self._batch.items.append(message)
        self._bytes += size
        return messages

    def rest(self) -> list[bias_service_pb2.AuditGenderRequest]:
        """Give what was gathered.

        Returns
        -------
        list of AuditGenderRequest
            One message, or none if there is nothing.
        """
        batch, self._batch, self._bytes = self._batch, bias_service_pb2.LabelledBatch(), 0
        return [bias_service_pb2.AuditGenderRequest(batch=batch)] if batch.items else []


def gender_value(gender: Gender | str | None) -> bias_service_pb2.Gender.ValueType:
    """Find the contract's value of a gender.

    Parameters
    ----------
    gender
        In any case; None or empty for an ungendered item.

    Returns
    -------
    bias_service_pb2.Gender.ValueType
        Of the label.

    Raises
    ------
    InputError
        If it is neither.
    """
    if not gender:
        return bias_service_pb2.GENDER_UNSPECIFIED
    try:
        return bias_service_pb2.Gender.Value(f"GENDER_{Gender(str(gender).upper()).value}")
    except ValueError as error:
        raise exceptions.InputError(f"{gender!r} is neither woman nor man, nor empty") from error
