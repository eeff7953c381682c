"""A device's plan: probes the machine, chooses a plan that fits it, and checks the plan by one real step.

`step_costs` holds the formulas, `planner` the order of choice, `device_plan` a device's plan with its trial step, and
`planned_work` the work of a live device under its plan. `backend` is the interface of a training library.
"""
