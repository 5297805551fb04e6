"""The work itself: prepare a model, train it, measure it, save it."""
