"""The planner: candidates, rows, the one to take, and what to measure first."""
