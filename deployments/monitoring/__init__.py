"""Alert rules and the dashboard, made from the rows of `deployments.metrics`.

`python -m deployments.monitoring` writes them into the chart (`helm/monofacet/files`).
"""
