"""What a backbone is trained to do without labels, behind one small interface (`Pretext`).

The stage `pretrain` and the training loop know nothing more of it; another pretext is a module here, its
network in `models/pretext`, and a line in `_PRETEXTS`.
"""

from __future__ import annotations

from flows.errors import ConfigError
from flows.imaging import Preprocessing
from flows.params import Params
from flows.pretexts.interface import Pretext
from flows.pretexts.moby import MoBYPretext
from flows.pretexts.simmim import SimMIMPretext
from flows.training import Processes

_PRETEXTS: dict[str, type[Pretext]] = {"simmim": SimMIMPretext, "moby": MoBYPretext}


def create(params: Params, preprocessing: Preprocessing, processes: Processes) -> Pretext:
    """The pretext that params.yaml names, with a model of random weights (torch's generator).

    Raises:
        ConfigError: sizes in params.yaml do not fit one another.
    """
    try:
        return _PRETEXTS[params.pretrain.pretext](params, preprocessing, processes)
    except ValueError as error:
        raise ConfigError(f"params.yaml: `model` or `pretrain`: {error}") from None


__all__ = ["Pretext", "create"]
