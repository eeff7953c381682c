from benchmarks.secagg.flower_round import *
