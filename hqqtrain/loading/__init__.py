"""From a configuration to a model that has its weights: plan, memory check, reading, quantizing."""
