"""Text on disk → checked documents → tokens → packed rows: what `flows.data` is for images.

A package of its own, so that a change here does not make DVC run the image stages again.
"""
