"""Passes that raise many spellings of a computation to one operator of the ONNX standard."""
