"""Siamese Lab: learn a similarity metric with weight-sharing twins, and judge it on classes never seen."""

__version__ = "0.1.0"
