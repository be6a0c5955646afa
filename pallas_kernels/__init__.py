"""Fused kernels: single-device functions of plain arrays, one folder a back end. They import JAX (and triton) only."""
