"""The calls of the asyncio client, a module a service."""
