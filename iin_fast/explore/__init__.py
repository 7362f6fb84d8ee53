"""An explorer: one sample of a trained IIN, changed factor by factor, in Python and on a local page.

``iin-fast explore RUN`` opens the page. :class:`Explorer` is all of it but the page.
"""

from .axes import Axis, axes_of, principal_axes
from .explorer import Explorer, Neighbour, View

__all__ = ["Axis", "Explorer", "Neighbour", "View", "axes_of", "principal_axes"]
