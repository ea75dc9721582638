"""Exports CASA models to ONNX and TensorRT, and runs what was exported. Knows nothing of vLLM and HTTP."""
