# Generated from ../_async/__init__.py by tools/sync_side.py: edit that one, and run `make protos`.
"""The calls of the synchronous client, a module a service."""
