"""How client updates become the next adapter: aggregators, cohort selection, and the Flower Strategy composed of them.

numpy only, except `strategy`, `envelope` and `replies`, which face Flower.
"""
