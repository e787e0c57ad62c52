"""One service: latency, forecast, queue, routing, autoscaler, and their simulator."""
