"""Turn the arguments of a command line into a checked RunConfig.

This is the only package that uses Hydra. Other packages receive plain dataclasses, and every
mistake of the user becomes a UserError.
"""

from hqqtrain.compose.compose import compose
from hqqtrain.compose.recipes import recipe_files
from hqqtrain.compose.sweep import jobs

__all__ = ["compose", "jobs", "recipe_files"]
