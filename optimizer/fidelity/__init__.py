"""How close an engine is to the original: inputs, references, metrics, budgets."""
