"""Raw measurements with units: latency, memory, FLOPs, environment."""
