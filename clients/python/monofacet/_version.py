"""The client's version."""

from importlib.metadata import PackageNotFoundError, version

__all__ = ["__version__"]

try:
    __version__ = version("monofacet")
except PackageNotFoundError:
    # Imported from a source tree that was never installed.
    __version__ = "0+unknown"
