"""Softmax attention of whole rows: cuDNN's calls."""
