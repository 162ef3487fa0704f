"""The runtime: all that a device needs to open, run and check an artifact. No torch, no onnx, no onnx-ir."""
