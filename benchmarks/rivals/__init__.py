"""Layers and models of other libraries beside ours, on one device: what `benchmarks/rivals.md` says, measured.

task.py                           which layers are compared and at which sizes; what processes say they are at
jax_passes.py, torch_passes.py    the two clocks: train and prefill of a layer in each framework
ours.py, jla.py, fla.py           the layers of each library
release.py                        that of the PyTorch release of RAT
earlier.py                        rows of ours that an earlier file has
table.py, compare.py              the tables, and the command that prints them
"""
