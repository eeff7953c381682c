"""From a finished run to models that devices can serve: adapter merged, ONNX written, and proved equal (`run.py`).

Nothing is exported here, so that the command line can name `fedtune export` without loading torch.
"""
