from benchmarks.secagg.round_cost import *
