"""Inference with an exported model, on a device without torch: OpenAI's HTTP API, and a chat in the terminal.

The package exports nothing, so that the command line can name `fedtune serve` without loading onnxruntime.
"""
