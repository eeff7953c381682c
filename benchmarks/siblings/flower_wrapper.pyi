from benchmarks.privacy.flower_wrapper import *
