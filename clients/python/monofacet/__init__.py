"""Client of Monofacet."""
