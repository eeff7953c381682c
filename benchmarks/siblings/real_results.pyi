from benchmarks.real.real_results import *
