"""What TensorRT made of a graph: an engine's layers, as Polygraphy tells them."""

from __future__ import annotations

from pathlib import Path

from ojfa_export.backends.cuda.device import the_device
from ojfa_export.backends.tensorrt import api
from ojfa_export.errors import BackendError


def describe_layers(path: Path) -> str:
    """An engine's inputs, outputs and layers with their data types, for people.

    Args:
        path: The engine file; its digest has been checked.

    Raises:
        BackendError: Polygraphy isn't installed, or TensorRT refuses the engine.
    """
    try:
        from polygraphy.backend.trt.util import str_from_engine
    except ImportError as error:
        raise BackendError(
            "an engine's layers are shown by Polygraphy, which is not installed",
            hint="pip install 'ojfa-export[polygraphy]'",
        ) from error
    device = the_device()
    device.make_current()
    engine = api.deserialize(path.stem, path.read_bytes())
    context = api.create_context(engine, 0, int(device.stream))
    try:
        return str(str_from_engine(engine, context, show_layers=True, show_attrs=True))
    except (KeyError, ValueError):  # of some layers 8.6 writes JSON that is none
        return api.layers(engine)
