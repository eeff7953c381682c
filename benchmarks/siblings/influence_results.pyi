from benchmarks.influence.influence_results import *
