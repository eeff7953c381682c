from benchmarks.privacy.report import *
