from benchmarks.simulation.facts import *
