"""Passes that raise decomposed forms of a computation to one operator of the ONNX standard."""
