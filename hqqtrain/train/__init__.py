"""Training: the loop, the parts of a step, and the state between two steps."""
