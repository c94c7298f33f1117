"""Which bundles a server serves, as its settings name them; read without opening anything but their manifests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deployments.operations.settings import Settings
from services.bundle.manifest import MANIFEST_NAME, Manifest, manifest_sha256, parse_manifest
from services.errors import BundleError, BundleFileError

if TYPE_CHECKING:
    from services.bundle.load import Bundle


class WrongBundle(BundleError):
    """The bundle is whole, but not one that may be served here."""


class NamesClash(ValueError):
    """Two bundles of one name: no request could tell them apart."""


@dataclass(frozen=True, slots=True)
class Served:
    """One bundle of those that are served.

    Attributes
    ----------
    name
        Of its manifest.
    settings
        Those of the server, with this bundle as the only one and pinned to its id: what its replicas get.
    default
        Whether requests that name no bundle get it.
    draws
        Whether it has a pipeline, and the settings want a generator.
    """

    name: str
    settings: Settings
    default: bool
    draws: bool

    @property
    def encoder(self) -> str:
        """Name of its encoder's deployment."""
        return deployment_of("encoder", self.name, self.default)

    @property
    def generator(self) -> str:
        """Name of its generator's deployment."""
        return deployment_of("generator", self.name, self.default)


def deployment_of(kind: str, bundle: str, default: bool) -> str:
    """Return the name of a deployment: the bare kind for the default bundle, so that most servers see no other."""
    return kind if default else f"{kind}-{bundle}"


def read_served(settings: Settings) -> tuple[Served, ...]:
    """Read the manifests of the bundles to serve, in their order.

    Raises
    ------
    BundleError
        When a manifest cannot be read, or is of a bundle that may not be served; it names the directory.
    NamesClash
        When two have one name.
    """
    found: dict[str, Served] = {}
    for path in settings.served:
        manifest = _manifest(path)
        known = found.get(manifest.name)
        if known is not None:
            raise NamesClash(
                f"{known.settings.bundle} and {path} are both named {manifest.name!r}; bundles that are served "
                "together must have different names"
            )
        full_id = f"{manifest.name}@{manifest_sha256(manifest)}"
        _check_id(full_id, settings, f"{path}: ")
        alone = settings.model_copy(update={"bundle": path, "bundles": (), "bundle_ids": (full_id,)})
        draws = settings.generator and manifest.diffusion is not None
        found[manifest.name] = Served(manifest.name, alone, not found, draws)
    return tuple(found.values())


def load_served(settings: Settings) -> Bundle:
    """Load the bundle that a replica is to serve, verified: its files may have changed since the server started.

    Raises
    ------
    BundleError
        When a file is not what the manifest says, or when another bundle lies there now.
    """
    from services.bundle.load import Bundle

    bundle = Bundle.load(settings.bundle)
    _check_id(f"{bundle.manifest.name}@{bundle.sha256}", settings)
    return bundle


def _check_id(full_id: str, settings: Settings, where: str = "") -> None:
    if settings.bundle_ids and not full_id.startswith(settings.bundle_ids):
        name, _, sha256 = full_id.partition("@")
        allowed = ", ".join(id[: id.index("@") + 13] for id in settings.bundle_ids)
        raise WrongBundle(f"{where}the bundle is {name}@{sha256[:12]}, and only {allowed} may be served")


def _manifest(path: Path) -> Manifest:
    try:
        return parse_manifest((path / MANIFEST_NAME).read_bytes())
    except OSError as error:
        raise BundleFileError(f"{path}: no {MANIFEST_NAME} to read") from error
    except BundleError as error:
        raise type(error)(f"{path}: {error}", error.violations, reason=error.reason) from error
