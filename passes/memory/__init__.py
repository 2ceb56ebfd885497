"""Passes that change when things are computed, and so how much memory is needed at once."""
