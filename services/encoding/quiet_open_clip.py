"""open_clip without transformers: it imports them for Hugging Face's towers, which are refused here anyway.

They would cost every start of an encoder more than a second.
"""

from __future__ import annotations

import sys
from typing import Any, cast

_TRANSFORMERS = "transformers"

if _TRANSFORMERS in sys.modules:
    import open_clip
else:
    # A module that is None cannot be imported, which open_clip takes for "not installed".
    sys.modules[_TRANSFORMERS] = cast(Any, None)
    try:
        import open_clip
    finally:
        del sys.modules[_TRANSFORMERS]

__all__ = ["open_clip"]
