"""Option groups, in YAML. A package, so that Hydra finds them wherever hqqtrain is installed."""
