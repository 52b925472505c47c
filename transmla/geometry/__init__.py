"""Every dimension, rank and scale of a conversion, and the rotary frequencies that it has to do with."""

from transmla.geometry.derivation import candidates, derive_geometry
from transmla.geometry.mla_geometry import MLAGeometry, full_rank, head_dimension

__all__ = ["MLAGeometry", "candidates", "derive_geometry", "full_rank", "head_dimension"]
