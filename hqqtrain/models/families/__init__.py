"""How architectures are built: decoder layers, head and projections of a model."""
