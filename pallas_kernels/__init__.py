"""Fused kernels: single-device functions of plain arrays, one folder an op. They import JAX (and triton) only."""
