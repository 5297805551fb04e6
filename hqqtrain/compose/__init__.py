"""From the words of a command line to a checked `RunConfig`: the only code that knows Hydra."""
