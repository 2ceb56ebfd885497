"""Passes that make matrices smaller."""
