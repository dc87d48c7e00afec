"""What a network is trained to do without labels, behind one small interface (`Pretext`).

The pretraining stages and the training loop know nothing more of it; another pretext is a module here, its
network in `models/pretext`, and for images a line in `_PRETEXTS`. `causal_lm` is that of the language track.
"""

from __future__ import annotations

from flows.errors import ConfigError
from flows.imaging import Preprocessing
from flows.params import Params
from flows.pretexts.images import ImagePretext
from flows.pretexts.interface import Pretext
from flows.pretexts.moby import MoBYPretext
from flows.pretexts.simmim import SimMIMPretext
from flows.training import Processes

_PRETEXTS: dict[str, type[ImagePretext]] = {"simmim": SimMIMPretext, "moby": MoBYPretext}


def create(params: Params, preprocessing: Preprocessing, processes: Processes) -> ImagePretext:
    """The pretext that params.yaml names, with a model of random weights (torch's generator).

    Raises:
        ConfigError: sizes in params.yaml do not fit one another.
    """
    try:
        return _PRETEXTS[params.pretrain.pretext](params, preprocessing, processes)
    except ValueError as error:
        raise ConfigError(f"params.yaml: `model` or `pretrain`: {error}") from None


__all__ = ["ImagePretext", "Pretext", "create"]
