"""Vision tower to ONNX."""
