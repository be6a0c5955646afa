"""Causal linear attention, the core of residual linear attention (arXiv 2506.15545): an entry point a back end."""
