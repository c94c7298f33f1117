"""The domain's exceptions.

::

    MonofacetError
    ├── InvalidInput                  the caller can repair the request
    │   ├── ImageError
    │   │   ├── UnsupportedImageFormat    not PNG, JPEG or WebP by content
    │   │   ├── ImageTooLarge             more bytes or pixels than allowed, or too elongated
    │   │   ├── ImageTooSmall             a side shorter than allowed
    │   │   ├── ImageTooCostly            would take too long to decode
    │   │   └── CorruptImage              truncated or damaged
    │   ├── TextTooLong                   longer than the context (or than any text we read)
    │   ├── UnknownDictionary
    │   ├── UnknownFeature
    │   ├── UnknownAttribute
    │   ├── NotEnoughPairs                statistics asked of too few pairs
    │   └── NotEnoughItems                an audit of too few items
    ├── NotCalibrated                 the bundle has no section for what is asked
    ├── NoPipeline                    the bundle has no text-to-image pipeline
    ├── SteeringUnsupported           this bundle's pipeline cannot be steered that way
    ├── GenerationFailed              one image could not be made; its neighbours were
    └── BundleError                   the bundle on disk cannot be served
        ├── ManifestError                 a missing, unknown or ill-typed key
        ├── BundleFileError               a wrong hash or size, a missing or an extra file
        ├── UnsafeWeights                 weights that are not safetensors
        ├── TowerMismatch                 a dictionary trained on another tower
        │   └── SelfCheckMismatch             towers, preprocessing or tokenizer that answer otherwise than recorded
        └── UnsupportedModel              a configuration these towers cannot run

Every error has a `reason`, a constant in UPPER_SNAKE that clients may branch on, and `violations`: what is wrong with
which field, each with a reason of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar, NamedTuple, Self


class Violation(NamedTuple):
    """What is wrong with one field.

    Attributes
    ----------
    path
        Of the field, relative to the item or to the request.
    description
        What is wrong.
    reason
        Constant in UPPER_SNAKE; empty for that of the error that holds it.
    """

    path: str
    description: str
    reason: str = ""


class MonofacetError(Exception):
    """Root of the tree.

    Parameters
    ----------
    message : str
        What is wrong, for a person; never a path or host of the server.
    violations : iterable of Violation or of (path, description)
        The fields at fault; empty when the fault is not in a field.
    reason : str or None
        Overrides the class's reason.
    """

    default_reason: ClassVar[str] = "INTERNAL"

    def __init__(
        self,
        message: str,
        violations: Iterable[Violation | tuple[str, str]] = (),
        *,
        reason: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        filled = (Violation(*violation) for violation in violations)
        self.violations = tuple(v._replace(reason=v.reason or self.reason) for v in filled)

    def moved(self, move: Callable[[str], str]) -> Self:
        """Return the same error with `move` of each field's path."""
        violations = [violation._replace(path=move(violation.path)) for violation in self.violations]
        error = _rebuild(type(self), self.message, violations, self.reason)
        if not isinstance(error, type(self)):
            raise TypeError(type(error))
        return error

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions with keyword-only arguments do not survive a trip between processes by default.
        return _rebuild, (type(self), self.message, self.violations, self.reason)


def _rebuild(
    kind: type[MonofacetError],
    message: str,
    violations: Sequence[Violation | tuple[str, str]],
    reason: str,
) -> MonofacetError:
    error = kind.__new__(kind)
    MonofacetError.__init__(error, message, violations, reason=reason)
    return error


class InvalidInput(MonofacetError):
    """The request holds something that cannot be processed."""

    default_reason = "INVALID_INPUT"

    def at(self, field_path: str) -> InvalidInput:
        """Return the same error, blamed on `field_path`."""
        error = _rebuild(type(self), self.message, [(field_path, self.message)], self.reason)
        if not isinstance(error, InvalidInput):
            raise TypeError(type(error))
        return error

    @classmethod
    def gather(cls, errors: Sequence[InvalidInput]) -> InvalidInput:
        """Return one error that names every field of `errors`.

        The reason is kept where all agree, so that a single bad item in a batch reads like a bad item alone; where they
        do not, each field keeps its own.
        """
        if len(errors) == 1:
            return errors[0]
        reasons = {error.reason for error in errors}
        violations = [violation for error in errors for violation in error.violations]
        kinds = {type(error) for error in errors}
        kind = kinds.pop() if len(kinds) == 1 else InvalidInput
        reason = reasons.pop() if len(reasons) == 1 else InvalidInput.default_reason
        error = _rebuild(kind, f"{len(errors)} items cannot be processed", violations, reason)
        if not isinstance(error, InvalidInput):
            raise TypeError(type(error))
        return error


class ImageError(InvalidInput):
    """An image that is refused."""

    default_reason = "IMAGE_INVALID"


class UnsupportedImageFormat(ImageError):
    """The bytes are not a PNG, JPEG or WebP image."""

    default_reason = "IMAGE_FORMAT_UNSUPPORTED"


class ImageTooLarge(ImageError):
    """The image has more bytes or pixels than allowed, or is too elongated."""

    default_reason = "IMAGE_TOO_LARGE"


class ImageTooSmall(ImageError):
    """A side of the image is shorter than allowed."""

    default_reason = "IMAGE_TOO_SMALL"


class ImageTooCostly(ImageError):
    """Decoding the image, or reading its chunks, would take longer than allowed."""

    default_reason = "IMAGE_TOO_COSTLY"


class CorruptImage(ImageError):
    """The image is truncated or damaged."""

    default_reason = "IMAGE_CORRUPT"


class TextTooLong(InvalidInput):
    """The text does not fit the context and the request does not allow truncation."""

    default_reason = "TEXT_TOO_LONG"


class UnknownDictionary(InvalidInput):
    """The bundle has no dictionary of that name."""

    default_reason = "UNKNOWN_DICTIONARY"

    @classmethod
    def named(cls, name: str, known: Iterable[str], field_path: str = "dictionary") -> UnknownDictionary:
        """Return the error for `name`, listing the dictionaries that are `known`."""
        message = f"no dictionary {name!r}; this bundle has {', '.join(sorted(known))}"
        return cls(message, [(field_path, message)])


class UnknownFeature(InvalidInput):
    """The dictionary has no feature of that number."""

    default_reason = "UNKNOWN_FEATURE"

    @classmethod
    def numbered(cls, feature: int, n_features: int, field_path: str = "feature") -> UnknownFeature:
        """Return the error for `feature`, naming the range that exists."""
        message = f"no feature {feature}; this dictionary has features 0 to {n_features - 1}"
        return cls(message, [(field_path, message)])


class UnknownAttribute(InvalidInput):
    """The bundle has no attribute of that name."""

    default_reason = "UNKNOWN_ATTRIBUTE"


class NotEnoughPairs(InvalidInput):
    """Statistics were asked of fewer pairs than they need."""

    default_reason = "NOT_ENOUGH_PAIRS"


class NotEnoughItems(InvalidInput):
    """An audit was asked of fewer items than it needs."""

    default_reason = "NOT_ENOUGH_ITEMS"


class NotCalibrated(MonofacetError):
    """The bundle was made without the calibration that the call needs."""

    default_reason = "MODEL_NOT_CALIBRATED"


class NoPipeline(MonofacetError):
    """The bundle has no text-to-image pipeline."""

    default_reason = "NO_PIPELINE"


class SteeringUnsupported(MonofacetError):
    """The pipeline cannot be steered that way: another tower, another layer, or no such path."""

    default_reason = "STEERING_UNSUPPORTED"


class GenerationFailed(MonofacetError):
    """An image could not be made: its numbers are not finite, or its own step failed."""

    default_reason = "GENERATION_FAILED"


class BundleError(MonofacetError):
    """The bundle on disk cannot be served."""

    default_reason = "BUNDLE_INVALID"


class ManifestError(BundleError):
    """The manifest has a missing, unknown or ill-typed key."""

    default_reason = "MANIFEST_INVALID"


class BundleFileError(BundleError):
    """A file is missing, extra, or not the one the manifest describes."""

    default_reason = "BUNDLE_FILE_INVALID"


class UnsafeWeights(BundleError):
    """Weights in a format that can run code when read."""

    default_reason = "UNSAFE_WEIGHTS"


class TowerMismatch(BundleError):
    """A dictionary was trained on the embeddings of another tower."""

    default_reason = "TOWER_MISMATCH"


class SelfCheckMismatch(TowerMismatch):
    """The towers do not answer as they did when the bundle was made: they are used in another way."""

    default_reason = "PROBE_MISMATCH"


class UnsupportedModel(BundleError):
    """The model's configuration asks for something these towers cannot run."""

    default_reason = "MODEL_UNSUPPORTED"
