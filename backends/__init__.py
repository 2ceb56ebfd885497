"""The built-in backends, one file or folder a runtime."""

BACKENDS = {
    "onnxruntime": "planish.backends.onnxruntime.target:OnnxRuntime",
    "openvino": "planish.backends.openvino.target:OpenVino",
    "tensorrt": "planish.backends.tensorrt.target:TensorRt",
}
