"""The formats of rows: which columns each has, and how a row becomes an example."""
