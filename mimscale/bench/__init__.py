"""Benchmark bodies: what a user can run on his own store. `benchmarks/` holds peers, volumes and results."""
