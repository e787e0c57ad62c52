"""One service: latency, forecast, queue, autoscaler, and their simulator."""
