"""Token rankings for FR-Spec (arXiv 2502.14856): the ids of a vocabulary by how often they occur.

`Ranking` is the file, `add_arguments` and `run` are the command `frspec rank-tokens`.
"""

from .command import add_arguments, run
from .file import Ranking

__all__ = ["Ranking", "add_arguments", "run"]
