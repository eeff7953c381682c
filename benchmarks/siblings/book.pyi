from benchmarks.real.book import *
