"""What devices and server compute with: the quantized base, its adapter, examples, loss and evaluation.

Nothing is exported here, so that what needs no torch (shapes) costs no import of it.
"""

import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of optional packages that nothing here uses
