"""How right the planner is: one module per task, each with `measure(data) -> Score`."""
