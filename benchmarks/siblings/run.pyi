from benchmarks.simulation.run import *
