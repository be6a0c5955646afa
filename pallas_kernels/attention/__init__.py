"""Softmax attention: cuDNN's calls, of whole rows, and JAX's splash attention on TPU."""
