"""One page of HTML that compares runs; `python -m rat_jax.report` writes it.

run            what a workdir holds of a run            chart         curves on axes, as paths of SVG
result_files   the JSON files of results in it          curves        which curves of the runs are drawn
measurements   what those hold                          table         rows and columns with a caption
costs          parameters and caches of a model         run_tables    figures of the runs, and their configs
amounts        numbers and values as text               score_tables  scores with their errors, best in bold
                                                        page          all of it as HTML, by templates/

Nothing here changes a workdir. What a file of one says is text on the page, never markup.
"""

from rat_jax.report.page import render
from rat_jax.report.run import Run, read_runs

__all__ = ["Run", "read_runs", "render"]
