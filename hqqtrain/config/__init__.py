"""The typed configuration: one dataclass for each group of keys, and the checks on them."""
