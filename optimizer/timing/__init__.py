"""Latency of engines: timing in alternation, and the tuning table."""
