"""Passes that only remove nodes: constant, repeated, unused, or without effect."""
