"""Export of a module, or import of an ONNX file, to a graph."""
