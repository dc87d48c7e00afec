"""Lamina: language models whose attention runs on memory devices, everything else on compute devices (after
arXiv 2405.01814). `slices` cuts a decoder at its attention and describes the pieces in a bundle."""
