"""The ``monofacet`` command.

Exit codes: 0 done; 1 the server failed; 2 wrong usage; 3 an input or name is bad; 4 the server cannot be
reached, is not ready, is overloaded or too slow; 5 not allowed; 130 interrupted;
141 whoever read the output stopped reading.
"""

from monofacet.cli._app import app, main

__all__ = ["app", "main"]
