"""What this device trains under: probe the machine, choose a plan that fits it, and check it against one real step.

`step_costs` holds the formulas, `planner` the order of choice, `device_plan` a device's plan with its trial step, and
`planned_work` what a live device does under it. `backend` says what a library that trains must offer for that.
"""
