"""What both sides must agree on: the job, the adapter's layout, messages, errors, seeds.

numpy, cryptography and parsers only: never torch, never flwr.
"""
