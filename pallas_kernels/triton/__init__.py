"""Triton kernels of the RAT mixing op, called through jax-triton: single-device functions of plain arrays.

`problem` (sizes, and why a shape is refused) imports neither triton nor jax-triton. The other modules import
triton, and `call` imports jax-triton when a kernel is first traced, because jax-triton 0.3.1 cannot be
imported without a GPU.
"""
