"""Passes that only remove: what is constant, repeated, unused or does nothing."""
