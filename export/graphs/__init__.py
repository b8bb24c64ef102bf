"""The torch modules behind every graph, and their export to ONNX."""
