from benchmarks.live.exchanges import *
