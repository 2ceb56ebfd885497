"""Calibration data, activation statistics, and sensitivities for mixed precision."""
