"""Generated stubs of the contract ``monofacet.v1``; made by ``clients/python/tools/generate.py``."""
