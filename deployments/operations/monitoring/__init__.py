"""Alert rules and the dashboard, made from the rows of `deployments.operations.metrics`."""
