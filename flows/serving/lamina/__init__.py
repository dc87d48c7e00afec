"""Lamina: language models served with attention offloaded to memory devices (spec: serving)."""
