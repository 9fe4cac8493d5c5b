"""Which volumes an epoch draws, when some kinds of volumes are drawn less often than others.

    N volumes | K kinds of volumes: one for each value that weights go by

The kind with the highest weight is drawn whole in every epoch. A kind with half of that weight is drawn to one half,
and to the other half in the next epoch: it goes round and round in a fixed random order. So no volume is drawn twice in
an epoch, the kinds stand in the asked proportion in every epoch, and after any number of epochs the volumes of a kind
have been drawn equally often, to within one.
"""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mimscale.errors import ConfigError
from mimscale.stream import order


class EqualShares:
    """Every volume, in every epoch."""

    digest = ""

    def __init__(self, num_volumes: int) -> None:
        self.drawn_per_epoch = num_volumes

    def volumes(self, draw: NDArray[np.int64], seed: int, epoch: int) -> NDArray[np.int64]:
        """The volume of each draw [n] of an epoch, each draw below `drawn_per_epoch`."""
        return order.permuted(draw, self.drawn_per_epoch, seed, epoch)


class WeightedShares:
    """Volumes by the weight of their kind."""

    def __init__(self, kind_of_volume: NDArray[np.int64], weights: Sequence[float]) -> None:
        """Take the kind [N] of each volume and the weight [K] of each kind; every kind has a volume."""
        self._members = np.argsort(kind_of_volume, kind="stable")  # volumes by kind
        self._sizes = np.bincount(kind_of_volume, minlength=len(weights)).astype(np.int64)  # [K]
        relative = np.asarray(weights, dtype=np.float64) / max(weights)
        self._drawn = np.maximum(1, np.rint(self._sizes * relative)).astype(np.int64)  # [K] an epoch
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._ends = np.cumsum(self._drawn)
        self.drawn_per_epoch = int(self._ends[-1])
        self.digest = hashlib.sha256(
            kind_of_volume.astype("<i8").tobytes() + self._drawn.astype("<i8").tobytes()
        ).hexdigest()[:16]

    def volumes(self, draw: NDArray[np.int64], seed: int, epoch: int) -> NDArray[np.int64]:
        """The volume of each draw [n] of an epoch, each draw below `drawn_per_epoch`."""
        place = order.permuted(draw, self.drawn_per_epoch, seed, epoch)
        kind = np.searchsorted(self._ends, place, side="right")
        volume = np.empty_like(place)
        for each in np.unique(kind):
            of_kind = kind == each
            turn = place[of_kind] - (self._ends[each] - self._drawn[each]) + epoch * self._drawn[each]
            own_seed = int(order.draw_seeds(seed, int(each), order.KIND))
            member = order.permuted(turn % self._sizes[each], int(self._sizes[each]), own_seed, epoch=0)
            volume[of_kind] = self._members[self._starts[each] + member]
        return volume


def weighted_shares(value_of_volume: NDArray[np.str_], weight_of: Mapping[str, float], key: str) -> WeightedShares:
    """Shares by the value [N] that each volume has; values without a weight weigh 1.

    Raises:
        ConfigError: a weight for a value that no volume has.
    """
    values, kinds = np.unique(value_of_volume, return_inverse=True)
    unknown = sorted(set(weight_of) - set(values.tolist()))
    if unknown:
        raise ConfigError(
            f"{key}: no selected volume has {', '.join(map(repr, unknown))}; there are "
            + ", ".join(repr(str(value)) for value in values[:20])
        )
    return WeightedShares(kinds.reshape(-1).astype(np.int64), [weight_of.get(str(value), 1.0) for value in values])
