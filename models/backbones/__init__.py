"""Backbones: an image → maps of tokens."""
