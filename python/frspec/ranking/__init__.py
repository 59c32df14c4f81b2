"""Token rankings for FR-Spec (arXiv 2502.14856): the ids of a vocabulary by how often they occur.

file          `Ranking`, the file and the sub-vocabularies out of it
command       `frspec rank-tokens`: counting, merging (merge), published lists (imported)
corpus        inputs as one sequence of chunks, out of files (file_chunks, compressed) and tables
              (table_chunks)
chunk         a piece of the corpus; records: the texts of its records
count         the tokens of chunks, added up in order; workers: over processes
checkpoint    what an interrupted run goes on from
compare       two rankings, for `frspec compare-rankings`
"""

from .command import add_arguments, run
from .file import Ranking

__all__ = ["Ranking", "add_arguments", "run"]
