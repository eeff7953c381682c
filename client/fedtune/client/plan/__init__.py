"""What this device trains under: probe the machine, choose a plan that fits it, and check it against one real step.

`memory` and `seconds` hold the formulas, `planner` the order of choice, `calibration` the real step.
"""
