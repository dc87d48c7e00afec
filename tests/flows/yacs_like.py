"""A class that stands for yacs' CfgNode: a dict of another package, pickled beside weights."""


class CfgNode(dict):  # type: ignore[type-arg]
    pass
