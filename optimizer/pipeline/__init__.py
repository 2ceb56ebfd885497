"""Passes in a row, and the instruments that watch them."""
