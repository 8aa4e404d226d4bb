"""Every op's declaration, from which its tests, its benchmark row and its row in the documentation are made."""

from . import augment, averaging, batch_norm, bookkeeping, squeeze_excite
from .declaration import Arguments, Case, OpSpec

__all__ = ["SPECS", "Arguments", "Case", "OpSpec"]

SPECS = (augment.SPEC, averaging.SPEC, batch_norm.SPEC, bookkeeping.SPEC, squeeze_excite.SPEC)
