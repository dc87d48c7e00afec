"""Attention workers: the processes that keep keys and values and compute attention over them."""
