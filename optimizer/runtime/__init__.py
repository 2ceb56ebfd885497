"""Engines at work: worker processes, generation, batches, cases."""
