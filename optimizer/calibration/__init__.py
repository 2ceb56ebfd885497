"""Calibration data, statistics of activations, sensitivities for mixed precision."""
