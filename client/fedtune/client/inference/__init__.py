"""Answering prompts with an exported model, on a device without torch: OpenAI's HTTP API, and a terminal chat.

Nothing is exported here, so that the command line can name `fedtune serve` without loading onnxruntime.
"""
