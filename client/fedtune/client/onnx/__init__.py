"""Local training with onnxruntime and numpy, on an edge pack; nothing in this package imports torch."""
