"""Passes that change the order of execution, and thereby peak memory."""
