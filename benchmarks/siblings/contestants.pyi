from benchmarks.simulation.contestants import *
