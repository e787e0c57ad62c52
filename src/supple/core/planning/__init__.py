"""The planner: candidates, rows, the recommended row, and the next measurement."""
