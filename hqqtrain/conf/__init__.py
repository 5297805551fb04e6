"""Option groups in YAML, as a package so that Hydra finds them wherever hqqtrain is installed."""
