from benchmarks.simulation.workload import *
