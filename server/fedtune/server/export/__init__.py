"""The export of a finished run as a model that devices can serve: adapter merged, ONNX written, and proved equal.

Nothing is exported here, so that the command line can name `fedtune export` without loading torch.
"""
