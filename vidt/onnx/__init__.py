"""Export to ONNX, its proof, and the exported detector that runs without PyTorch."""
