"""The calls of the synchronous client, a module a service."""
