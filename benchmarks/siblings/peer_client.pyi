from benchmarks.simulation.peer_client import *
