"""What operators see and set: settings, metrics, logs, monitoring and the chart."""
