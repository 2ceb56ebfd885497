"""Passes that reduce the size of matrices."""
