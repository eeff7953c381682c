"""The report of a run as one self-contained HTML page: numbers, plots, answers, dropouts, the job.

`reading` reads a run directory and checks it, `canvas` and `plots` draw, `page` fills the templates.
"""

from fedtune.server.report.page import write_comparison, write_report

__all__ = ["write_comparison", "write_report"]
