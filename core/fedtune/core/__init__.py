"""The code that server and devices share: the job, the adapter's layout, messages, codecs, errors, seeds.

It needs numpy, cryptography and parsers only; it never imports torch or flwr.
"""
