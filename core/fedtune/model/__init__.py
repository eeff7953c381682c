"""The model in torch: the quantized base model, its adapter, loss and scoring.

The package exports nothing, so that modules that need no torch, such as shapes, can be imported without it.
"""

import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of optional packages that fedtune does not use
