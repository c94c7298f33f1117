"""The gRPC gateway: a `grpc.aio` server, small interceptors, and one servicer module per service."""
