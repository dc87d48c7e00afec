"""Typed view of params.yaml: every knob once, with its meaning, unit and legal range.

There are no defaults here: the file is the only source. `load()` checks all sections before anything runs and
names the offending key. Overlays (recipes, `--set key=value`) are merged before the check and add no keys.
"""

from flows.params.fields import Count, Section
from flows.params.language import Lamina
from flows.params.learning import (
    Distributed,
    Evaluate,
    Finetune,
    Ingest,
    LinearProbe,
    Loader,
    MoBYPretext,
    MoBYViews,
    Model,
    NearestNeighbours,
    Pretrain,
    RandomAugment,
    Scale,
    SimMIMPretext,
    Training,
)
from flows.params.operation import (
    Export,
    Monitor,
    Parity,
    Pipeline,
    Placement,
    Promotion,
    Registry,
    Rollout,
    Serve,
    Services,
    Study,
    StudyAnalysis,
    Sweep,
    Tracking,
)
from flows.params.reading import check, first_problem, flatten, load, nest, overlay, parse_setting, read
from flows.params.root import Params

__all__ = [
    "Count",
    "Distributed",
    "Evaluate",
    "Export",
    "Finetune",
    "Ingest",
    "Lamina",
    "LinearProbe",
    "Loader",
    "MoBYPretext",
    "MoBYViews",
    "Model",
    "Monitor",
    "NearestNeighbours",
    "Params",
    "Parity",
    "Pipeline",
    "Placement",
    "Pretrain",
    "Promotion",
    "RandomAugment",
    "Registry",
    "Rollout",
    "Scale",
    "Section",
    "Serve",
    "Services",
    "SimMIMPretext",
    "Study",
    "StudyAnalysis",
    "Sweep",
    "Tracking",
    "Training",
    "check",
    "first_problem",
    "flatten",
    "load",
    "nest",
    "overlay",
    "parse_setting",
    "read",
]
