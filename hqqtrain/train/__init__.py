"""Training by itself: the loop, what a step is made of, and the state between two steps."""
