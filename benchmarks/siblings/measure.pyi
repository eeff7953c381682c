from benchmarks.real.measure import *
