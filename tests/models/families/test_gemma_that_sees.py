"""Gemma 3 with what sees images: refused, and its language model alone, saved as the docs show."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tiny_models import VARIANTS, VOCAB_SIZE, make_checkpoint
from tolerances import LOGITS_FP32

from ojfa_export.errors import CheckpointError
from ojfa_export.models.checkpoint.checkpoint import Checkpoint
from ojfa_export.verify.reference import TransformersReference

PAGE = Path(__file__).resolve().parents[3] / "docs" / "checkpoints.md"
PUBLISHED = "gemma-3-4b-it"
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def test_the_language_model_is_saved_as_the_docs_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    monkeypatch.chdir(tmp_path)
    make_checkpoint("gemma3_text", tmp_path / PUBLISHED, seed=7)  # for the tokenizer beside it
    class_of_all = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    (tmp_path / PUBLISHED / "tokenizer_config.json").write_text(class_of_all)
    config = transformers.Gemma3Config(
        text_config=VARIANTS["gemma3_text"].build_config().to_dict(),
        vision_config=VISION,
        mm_tokens_per_image=4,
    )
    whole = transformers.Gemma3ForConditionalGeneration(config).eval()
    whole.save_pretrained(tmp_path / PUBLISHED)
    with pytest.raises(CheckpointError, match="family 'gemma3' reads images too") as refused:
        Checkpoint(tmp_path / PUBLISHED)
    assert "docs/checkpoints.md" in str(refused.value.hint)

    [block] = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    exec(block, {})

    saved = tmp_path / f"{PUBLISHED}-text"
    checkpoint = Checkpoint(saved)
    checkpoint.check_tensors()
    assert checkpoint.spec.family == "gemma3_text"
    ids = rng.integers(VOCAB_SIZE, size=(1, 20))
    found = TransformersReference(saved).forward(ids, lambda *_: None)
    with torch.inference_mode():
        wanted = whole(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=LOGITS_FP32)
