"""Export: a teacher as one ONNX graph, from PyTorch or from an ONNX file."""
