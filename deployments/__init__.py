"""How Monofacet is served: Ray Serve deployments and the gRPC gateway in front of them."""
