"""The HTTP port: Connect, gRPC-Web and JSON for every call, OpenAI's routes, health and OpenAPI."""
