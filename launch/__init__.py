"""Starts the training command on one machine, on TPU slices and on clusters.

Needs Python alone: neither JAX nor this project's other requirements have to be
installed where a job is started from.
"""
