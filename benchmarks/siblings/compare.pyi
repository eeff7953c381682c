from benchmarks.secagg.compare import *
