"""From a module or an ONNX file to a graph."""
