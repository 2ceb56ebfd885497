"""Planish beside its peers: speed, fidelity and cost, as ratios within one run. See docs/benchmarks.md."""
