"""Models with parts that no stored bundle has: both runtimes do the same."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest
from both_runtimes.both import Both
from both_runtimes.operations import MAX_LENGTH, VOCABULARY
from both_runtimes.settings import SEED, needs_programs

pytestmark = needs_programs
GREEDY = {"temperature": 0.0, "top_k": None, "top_p": 1.0, "seed": 0}
POLICY = {"exits": [1, 2], "measure": "top", "thresholds": [0.02, 0.02]}


# Norms of queries and keys, windows in some blocks; blocks that rotate nothing; norms after;
# attention and MLP side by side; norms in both places and softcaps; two sets of rotations.
@pytest.mark.parametrize(
    "name", ["qwen3-sliding-window", "smollm3", "olmo2", "gpt_neox", "gemma2", "gemma3_text"]
)
def test_a_session(name: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    import tiny_models

    from ojfa_export.compiler.options import BuildOptions
    from ojfa_export.compiler.pipeline import build

    text = tmp_path / "text.txt"
    text.write_text(inspect.getsource(tiny_models), encoding="utf-8")
    options = BuildOptions(
        str(tiny_models.make_checkpoint(name, tmp_path / "checkpoint", seed=SEED)),
        tmp_path / f"{name}.ojfa",
        rank=8,
        shortcut="ojfa",
        calibration_data=(text,),
        calibration_tokens=1024,
        max_cache_length=MAX_LENGTH,
        skip_verification=True,
    )
    build(options)
    both = Both(options.output)
    rng = np.random.default_rng(SEED)
    ids = rng.integers(VOCABULARY, size=(2, 30)).tolist()
    steps = rng.integers(VOCABULARY, size=(6, 2, 1)).tolist()
    both.compare(
        [
            [
                {"do": "begin", "batch_size": 2, "max_length": MAX_LENGTH, "shadow": None},
                {"do": "advance_every", "tokens": [ids[0], ids[1][:11]], "exit": "full"},
                *({"do": "advance", "tokens": each, "exit": "full"} for each in steps[:3]),
                *({"do": "decide", "tokens": each, "policy": POLICY} for each in steps[3:]),
                {"do": "rewind", "length": 5, "row": 0},
                {"do": "advance", "tokens": [[7], [8]], "exit": 2},
                {
                    "do": "generate",
                    "tokens": [[1], [2]],
                    "exit": "full",
                    "speculation": None,
                    "max_new_tokens": 12,
                    "sampling": GREEDY,
                    "stop_tokens": [],
                    "ignore_eos": True,
                },
            ]
        ]
    )
    both.cpp.close()
    assert both.done.refused == 0
