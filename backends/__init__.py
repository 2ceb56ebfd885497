"""The built-in backends, one file or folder a runtime."""

BACKENDS = {
    "onnxruntime": "planish.backends.onnxruntime:OnnxRuntime",
    "openvino": "planish.backends.openvino:OpenVino",
    "tensorrt": "planish.backends.tensorrt:TensorRt",
}
