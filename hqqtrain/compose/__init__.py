"""From the words of a command line to a checked RunConfig: the only code that knows Hydra.

Everything below receives plain dataclasses; everything a user got wrong becomes a UserError.
"""

from hqqtrain.compose.compose import compose
from hqqtrain.compose.recipes import recipe_files
from hqqtrain.compose.sweep import jobs

__all__ = ["compose", "jobs", "recipe_files"]
