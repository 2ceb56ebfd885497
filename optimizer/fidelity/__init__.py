"""Fidelity of an engine to the original: inputs, references, metrics, budgets."""
