from benchmarks.privacy.privacy_jobs import *
