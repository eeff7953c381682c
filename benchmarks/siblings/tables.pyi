from benchmarks.compression.tables import *
