"""Teachers: networks with their weights, from timm or an ONNX file, and what they can give."""
