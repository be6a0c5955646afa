"""How each back end starts a kernel, and what the kernels of a back end share: one module a back end."""
