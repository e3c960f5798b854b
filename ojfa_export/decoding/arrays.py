"""Types of arrays that every part speaks of."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]


# Hidden states, [tokens, H]: an array of NumPy's, or one in the memory of a device with as much of
# its interface as a session uses (`Executor.arrays` makes them).
Hidden = Any
# Token ids in the order of the rows; where `Engines.follows`, also choices of one token a row.
Tokens = Any
