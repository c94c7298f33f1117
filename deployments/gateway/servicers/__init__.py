"""One module per gRPC service: what a request means and what its answer looks like, nothing else."""
