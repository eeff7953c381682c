"""From a finished run to models that devices can serve: adapter merged, ONNX written, and proved equal.

export_run(Path("runs/first"), ["int4"], Path("runs/first/onnx"), display)
"""

from fedtune.server.export.run import Exported, ExportOptions, export_adapter, export_run

__all__ = ["ExportOptions", "Exported", "export_adapter", "export_run"]
