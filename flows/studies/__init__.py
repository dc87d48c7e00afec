"""What a table of pretrainings says about data, model size and training length (docs/data_scaling.md).

A cell is one pretraining: a model, so many training images, so many optimiser steps, and what came of it.
"""
