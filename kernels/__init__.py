"""Lazy Attention: biased causal attention through Elastic-Softmax (arXiv 2601.00919)."""

from lazypipe.kernels.api import lazy_attention

__all__ = ["lazy_attention"]
