"""The RAT mixing op (arXiv 2507.04416): `triton` and `tpu` are its entry points.

On GPUs the recurrence is Triton's; `select` says which back end computes the attention to chunk summaries. `shape`,
`select` and the `_tiling` modules import neither triton nor jax-triton.
"""
