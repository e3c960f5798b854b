"""Cases of `tests.gpu.prepare`, compiled for the GPU at hand.

python -m tests.gpu.prepare DIRECTORY            # anywhere with torch
OJFA_GPU_CASES=DIRECTORY pytest -m gpu tests/gpu  # on the machine with the GPU
OJFA_GPU_BACKEND=onnxruntime-cuda OJFA_GPU_CASES=… # the same for that backend
With pytest-xdist and `--dist loadgroup` each case's engines are built by one process. Then set
OMP_NUM_THREADS=1 and OPENBLAS_NUM_THREADS=1: else the processes' threads wait for each other.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from ojfa_export import backends
from ojfa_export.backends.block_jump import BlockJump, open_jump
from ojfa_export.bundle.names import CHECK_HEAD, graph_names
from ojfa_export.errors import OjfaError
from ojfa_export.models.spec import ModelSpec
from ojfa_export.runtime.session import Session

VARIABLE = "OJFA_GPU_CASES"
BACKEND = os.environ.get("OJFA_GPU_BACKEND", "tensorrt")
# How steps of few tokens run: in our kernels or all in engines; as recorded CUDA graphs or not.
DECODE = {
    "tensorrt": ("kernels", "engines"),
    "onnxruntime-cuda": ("recorded", "unrecorded"),
}


@pytest.fixture(scope="session", autouse=True)
def device() -> object:
    """The GPU; where there is none, its tests are left out."""
    try:
        from ojfa_export.backends.cuda.device import the_device

        return the_device()
    except (ImportError, OjfaError) as error:
        pytest.skip(f"no NVIDIA GPU can be used here: {error}")


@dataclass
class Case:
    """An exported model, and what the CPU runtime computed with it."""

    name: str
    directory: Path
    spec: ModelSpec
    precision: str
    expected: dict[str, np.ndarray]
    plans: dict[str, Path]
    exits: tuple[tuple[int, ...], int] | None = None  # of a block jump, and how many blocks
    quantised: bool = False
    recorded: bool = True
    opened: dict = field(default_factory=dict)

    @property
    def graphs(self) -> Path:
        return self.directory / "graphs"

    def engines(self):
        """The opened model: one for each way to decode, as opening takes longer than most tests."""
        how = os.environ.get("OJFA_DECODE"), self.recorded
        if how not in self.opened:
            self.opened[how] = self.open()
        return self.opened[how]

    def open(self):
        rotary = None
        if "cosines" in self.expected:
            rotary = self.expected["cosines"], self.expected["sines"]
        backend = backends.load(BACKEND)
        engines = backend.open_engines(self.spec, self.graphs, self.plans, rotary)
        if self.exits is not None:
            exits, blocks = self.exits
            jump = BlockJump(exits, blocks, self.spec, self.graphs, self.plans, rotary)
            open_jump(backend, engines, jump)
        if not self.recorded:
            engines.record = False
        return engines

    def session(self, batch: int = 1) -> Session:
        return Session(self.spec, self.engines(), batch, 2 * self.expected["token_ids"].shape[1])


def case_names() -> list[str]:
    directory = os.environ.get(VARIABLE)
    described = Path(directory).glob("*/case.json") if directory else ()
    return sorted(path.parent.name for path in described)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case_name" in metafunc.fixturenames:
        metafunc.parametrize("case_name", case_names(), scope="session")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A case's tests stay together, as its engines are built once in each process."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        name = getattr(item, "callspec", None) and item.callspec.params.get("case_name")
        if name:
            item.add_marker(pytest.mark.xdist_group(name))


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """A case by name, its engines built when it is first asked for."""
    opened: dict[str, Case] = {}

    def open_case(name: str) -> Case:
        if name not in opened:
            opened[name] = load_case(
                Path(os.environ[VARIABLE]) / name, tmp_path_factory.mktemp(name)
            )
        return opened[name]

    return open_case


def load_case(directory: Path, built: Path) -> Case:
    backend = backends.load(BACKEND)
    described = json.loads((directory / "case.json").read_text())
    quantised = described.get("quantised", False)
    if (described["precision"] == "bf16" or quantised) and BACKEND != "tensorrt":
        pytest.skip(f"{BACKEND} runs neither bf16 nor quantised weights")
    spec = ModelSpec.model_validate_json(json.dumps(described["spec"]))
    exits, blocks = tuple(described.get("exits", ())), described.get("exit_blocks", 0)
    plans = {name: built / f"{name}.json" for name in graph_names(spec.blocks, blocks)}
    for name, plan in plans.items():
        backend.build_engine(spec, directory / "graphs" / f"{name}.onnx", plan)
    with np.load(directory / "expected.npz") as arrays:
        expected = dict(arrays)
    if "check_tokens" in expected:
        plans[CHECK_HEAD] = built / f"{CHECK_HEAD}.json"
        narrowed = spec.with_vocabulary(len(expected["check_tokens"]))
        graph = directory / "graphs" / f"{CHECK_HEAD}.onnx"
        backend.build_engine(narrowed, graph, plans[CHECK_HEAD])
    jump = (exits, blocks) if exits else None
    precision = described["precision"]
    return Case(directory.name, directory, spec, precision, expected, plans, jump, quantised)


@pytest.fixture
def case(cases: Callable[[str], Case], case_name: str) -> Case:
    return cases(case_name)


@pytest.fixture(params=DECODE[BACKEND])
def decode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, case: Case) -> str:
    """How steps of few tokens run: see DECODE."""
    if BACKEND == "tensorrt":
        if (case.precision == "bf16" or case.quantised) and request.param == "engines":
            pytest.skip("there are no engines in bf16, and none of quantised weights")
        monkeypatch.setenv("OJFA_DECODE", request.param)
    else:
        monkeypatch.setattr(case, "recorded", request.param == "recorded")
    return str(request.param)
