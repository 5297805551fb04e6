"""Training on data that are read while the model is trained: `data.streaming`."""
