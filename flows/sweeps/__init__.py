"""Sweeps over params: which points a file asks for, what each has computed already, what came out.

Nothing here trains: a point is a workspace (`flows.workspace`) in which DVC runs the ordinary stages.
"""
