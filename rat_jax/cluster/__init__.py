"""The processes of one job on several hosts: how they find each other, and how each learns that another is lost.

One process is first, number 0. Every other has a link to it, a connection to the coordinator's address over which they
meet, compare what must be alike, and give signs of life until the end (`rat_jax.cluster.watch`). JAX's own service
starts on the same address once all are there: it aborts a process without saying which other one is missing, and
notices a dead one after 100 s.
"""

from rat_jax.cluster.launch import define_cluster_flags, first_alone_prints, given_flags
from rat_jax.cluster.watch import busy, leave, reached

__all__ = ["busy", "define_cluster_flags", "first_alone_prints", "given_flags", "leave", "reached"]
