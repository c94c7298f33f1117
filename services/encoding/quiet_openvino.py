"""OpenVINO without its telemetry; import it from here and nowhere else.

The package reports its use to its makers, from its import on and without asking. Where its telemetry module is not
to be had it falls back to a stub of its own, so that module is made unavailable first.
"""

from __future__ import annotations

import sys

sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

import openvino as ov  # noqa: E402

__all__ = ["ov"]
