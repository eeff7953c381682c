from benchmarks.real.rows import *
