"""Does a manifest say the same as the graphs that it describes?

Digests say that nothing was altered, not that it fits: a manifest that was written anew over other
files has right ones. So what the runtime takes from the manifest (shapes, where tables and weights
are) is compared with every graph before anything runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ojfa_export.bundle.checked import CheckedFiles
from ojfa_export.bundle.entries import GraphEntry, Port, TensorSlice
from ojfa_export.bundle.manifest import Manifest
from ojfa_export.bundle.names import GRAPHS, MANIFEST
from ojfa_export.bundle.onnx_file import OnnxFile, OnnxPort, OnnxTensor, read_onnx
from ojfa_export.bundle.shapes import Ports, expected_ports, expected_weights
from ojfa_export.errors import BundleError

HINT = "don't use this bundle: build it again"
SUFFIX = ".onnx"


def check_graphs(manifest: Manifest, files: CheckedFiles) -> None:
    """Compares a manifest with the portable graphs, and these with engines that are graphs.

    Args:
        manifest: What the bundle says of itself.
        files: The bundle's.

    Raises:
        BundleError: They contradict each other, or a graph refers to what is outside.
    """
    _Comparison(manifest, files).check()


class _Comparison:
    def __init__(self, manifest: Manifest, files: CheckedFiles) -> None:
        self._manifest, self._files = manifest, files

    def check(self) -> None:
        portable: dict[str, OnnxFile] = {}
        graphs, built = self._manifest.all_graphs, self._manifest.all_engines
        for entry in graphs:
            portable[entry.name] = self._read(entry.file)
            self._check_graph(entry, portable[entry.name])
        self._check_rotary(portable["embed"].tensors)
        for engines in built:
            for name, file in engines.files.items():
                if file.endswith(SUFFIX):
                    self._check_engine(file, self._read(file), portable[name])
        named = {entry.file for entry in graphs}
        named |= {file for engines in built for file in engines.files.values()}
        for file in sorted(self._manifest.files):
            if file.endswith(SUFFIX) and file not in named:  # several graphs' engines share it
                self._read(file)

    def _fail(self, file: str, detail: str) -> BundleError:
        return BundleError(f"{self._path(file)} contradicts {MANIFEST}: {detail}", hint=HINT)

    def _path(self, file: str) -> Path:
        return self._files.directory / file

    def _read(self, file: str) -> OnnxFile:
        """A graph whose tensors are all inside the bundle."""
        try:
            graph = read_onnx(self._files.read(self._path(file)))
        except ValueError as error:
            raise BundleError(f"{self._path(file)} can't be read: {error}", hint=HINT) from error
        for tensor in graph.tensors.values():
            entry = self._manifest.files.get(f"{GRAPHS}/{tensor.location}")
            if entry is None:
                raise self._fail(
                    file, f"tensor '{tensor.name}' is in {tensor.location!r}, which is not named"
                )
            if tensor.offset + tensor.length > entry.size:
                raise self._fail(file, f"tensor '{tensor.name}' reaches beyond {tensor.location!r}")
        return graph

    def _check_graph(self, entry: GraphEntry, graph: OnnxFile) -> None:
        if entry.file != f"{GRAPHS}/{entry.name}{SUFFIX}":
            raise self._fail(entry.file, f"it is not the file of '{entry.name}'")
        ports = expected_ports(self._manifest, entry.name)
        for what, described, found, wanted in (
            ("inputs", entry.inputs, graph.inputs, ports[0]),
            ("outputs", entry.outputs, graph.outputs, ports[1]),
        ):
            if _ports(described) != _ports(found):
                raise self._fail(entry.file, f"its {what} are others than described")
            self._check_ports(entry.file, what, _ports(found), wanted)
        for name in {f"{GRAPHS}/{each.location}" for each in graph.tensors.values()}:
            if name not in entry.weights:
                raise self._fail(entry.file, f"it refers to {name!r}, which is not described")
        self._check_weights(entry.file, entry.name, graph.tensors)

    def _check_ports(
        self,
        file: str,
        what: str,
        found: Ports,
        wanted: Ports,
    ) -> None:
        for name in found.keys() ^ wanted.keys():
            raise self._fail(file, f"{name!r} among its {what}")
        for name, (dtype, shape) in found.items():
            if (dtype, shape) != wanted[name]:
                raise self._fail(
                    file,
                    f"{name!r} is {dtype} {_shown(shape)}, a model of these sizes has "
                    f"{wanted[name][0]} {_shown(wanted[name][1])}",
                )

    def _check_weights(self, file: str, name: str, tensors: Mapping[str, OnnxTensor]) -> None:
        found = {weight: tensor.shape for weight, tensor in tensors.items()}
        wanted = expected_weights(self._manifest, name, found)
        for weight in found.keys() - wanted.keys():
            raise self._fail(file, f"such a model has no weight {weight!r}")
        for weight, (shape, required) in wanted.items():
            if weight not in found:
                if required:
                    raise self._fail(file, f"it has no weight {weight!r}")
            elif found[weight] != shape:
                raise self._fail(
                    file,
                    f"weight {weight!r} is {_shown(found[weight])}, a model of these sizes has "
                    f"{_shown(shape)}",
                )

    def _check_rotary(self, tensors: Mapping[str, OnnxTensor]) -> None:
        tables = self._manifest.rotary
        if tables is None:
            return
        for name, table in (("rotary_cos_table", tables.cos), ("rotary_sin_table", tables.sin)):
            tensor = tensors[name]
            there = TensorSlice(
                file=f"{GRAPHS}/{tensor.location}", offset=tensor.offset, shape=tensor.shape
            )
            if table != there or tensor.dtype != "float":
                raise self._fail(f"{GRAPHS}/embed{SUFFIX}", f"its {name} is elsewhere")

    def _check_engine(self, file: str, engine: OnnxFile, portable: OnnxFile) -> None:
        """Makes sure that an engine runs on its own graph's weights."""
        for tensor in engine.tensors.values():
            if not any(_holds(each, tensor) for each in portable.tensors.values()):
                raise self._fail(file, f"tensor '{tensor.name}' is none of its graph's weights")


def _holds(whole: OnnxTensor, part: OnnxTensor) -> bool:
    """Whether a tensor is another one, or some rows of it."""
    same = [(each.location, each.dtype, each.shape[1:]) for each in (whole, part)]
    return (
        same[0] == same[1]
        and whole.offset <= part.offset
        and part.offset + part.length <= whole.offset + whole.length
    )


def _ports(
    ports: tuple[Port, ...] | tuple[OnnxPort, ...],
) -> Ports:
    return {port.name: (port.dtype, port.shape) for port in ports}


def _shown(shape: tuple[int | str, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"
