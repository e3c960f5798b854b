"""Exported tiny checkpoints and the same in transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from chain import Chain, build_chain
from tiny_models import POSITIONS, make_checkpoint, make_model
from transformers import PreTrainedModel

from ojfa_export.bundle.weight_format import WeightFormat

SEED = 7

BuildChain = Callable[[str], Chain]
LoadModel = Callable[[str], PreTrainedModel]


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Tiny models gain nothing from threads, and lose much where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def chain_of(tmp_path_factory: pytest.TempPathFactory) -> BuildChain:
    """The exported variant, built when first asked for; "NAME int4" has quantised weights."""
    chains: dict[str, Chain] = {}

    def build(name: str) -> Chain:
        if name not in chains:
            variant, _, storage = name.partition(" ")
            weights = None
            if storage:
                weights = WeightFormat(storage=storage, group_size=32, zero_points=True)
            directory: Path = tmp_path_factory.mktemp(name.replace(" ", "-"))
            checkpoint = make_checkpoint(variant, directory / "checkpoint", seed=SEED)
            chains[name] = build_chain(checkpoint, directory, max_length=POSITIONS, weights=weights)
        return chains[name]

    return build


@pytest.fixture(scope="session")
def model_of() -> LoadModel:
    """The same variant in transformers; made anew, since LongRoPE keeps a state."""
    return lambda name: make_model(name, seed=SEED)
