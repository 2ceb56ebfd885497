"""Activation modes of `quantize-int8`, one a file."""
