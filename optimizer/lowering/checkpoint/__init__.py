"""Checkpoint folders: configuration, weights as references, adapters, quantized weights, tokenizers."""
