"""A bundle against what users call: `AutoTokenizer`, `from_pretrained` and `generate`.

These choose a checkpoint's files by themselves. Other comparisons share that choice, and the
tokenizer, with the compiler, and would not see a wrong one.
"""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ojfa_export.backends.frugal import close_all
from ojfa_export.bundle.manifest import Manifest
from ojfa_export.decoding.arrays import Int32
from ojfa_export.decoding.generation_defaults import GenerationDefaults
from ojfa_export.errors import CheckpointError
from ojfa_export.models import tokenizer
from ojfa_export.models.checkpoint.checkpoint import Checkpoint
from ojfa_export.models.checkpoint.quiet import quiet_transformers
from ojfa_export.runtime.model import Model
from ojfa_export.system.heap import trim_heap
from ojfa_export.system.memory import read_meminfo
from ojfa_export.verify.check import Check
from ojfa_export.verify.probes import probe_texts
from ojfa_export.verify.tolerances import TOKENIZER, TOLERANCES, arithmetic_of_model
from ojfa_export.verify.whole_model import load_whole

PROMPT_TOKENS = 16
NEW_TOKENS = 8
# Scores [V] of each step, and the tokens that transformers chose by them.
Continued = tuple[list[Any], list[int]]
# Of a truncation beyond this nobody writes so long a prompt.
LONGEST = 16_384


def verify_tokenizer(model: Model, checkpoint: Path) -> list[Check]:
    """Compares ids, and text of ids, with `AutoTokenizer`; the difference is how many texts differ.

    Args:
        model: An opened bundle.
        checkpoint: Directory of the checkpoint.

    Raises:
        CheckpointError: transformers can't open its tokenizer.
    """
    from transformers import AutoTokenizer

    with _speaking(checkpoint, "tokenizer"):
        theirs = AutoTokenizer.from_pretrained(
            os.fspath(checkpoint), local_files_only=True, trust_remote_code=False
        )
        truncation = (theirs.backend_tokenizer.truncation or {}).get("max_length", 0)
        added = [token.content for token in theirs.added_tokens_decoder.values()]
    added += [token.content for token in model.tokenizer.get_added_tokens_decoder().values()]
    differ: dict[str, int] = {}
    for name, texts in probe_texts(added, min(truncation, LONGEST)).items():
        ours = tokenizer.encode_all(model.tokenizer, texts)
        with _speaking(checkpoint, "tokenizer"):
            expected = [theirs(text)["input_ids"] for text in texts]
            decoded = [
                theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                for ids in expected
            ]
        differ[name] = sum(one != other for one, other in zip(ours, expected, strict=True))
        texts_of = (tokenizer.decode(model.tokenizer, ids) for ids in expected)
        wrong = sum(one != other for one, other in zip(texts_of, decoded, strict=True))
        differ["text of tokens"] = differ.get("text of tokens", 0) + wrong
    return [_equal(TOKENIZER + name, count) for name, count in differ.items()]


def verify_generation(
    model: Model, checkpoint: Checkpoint, token_ids: Int32, *, trust_remote_code: bool = False
) -> list[Check]:
    """Compares defaults of generation, and greedy text with `generate` of `from_pretrained`.

    Where that model, in fp32 whole, takes more memory than there is, text is not compared, and the
    check says so.

    Args:
        model: An opened bundle.
        checkpoint: The checkpoint.
        token_ids: [B,S] text, of whose beginnings each row is continued.
        trust_remote_code: Whether transformers may run code that lies in the checkpoint.

    Raises:
        CheckpointError: transformers can't open the model.
    """
    import torch

    checks = [verify_defaults(model.manifest, checkpoint)]
    # Weights in 16 bits become twice as many bytes, in 4 bits eight times.
    wider = 2 if checkpoint.layout is None else 8
    needed = wider * sum(path.stat().st_size for path in checkpoint.weight_files)
    if needed > read_meminfo().get("MemAvailable", needed):
        left_out = f"generate: left out, it may take {needed / 2**30:.1f} GiB"
        return [*checks, _equal(left_out, 0)]
    prompts, new_tokens = _prompts(model.manifest, token_ids)

    def continue_prompts() -> list[Continued]:
        with _speaking(checkpoint.directory, "model"):
            reference = load_whole(checkpoint, torch.float32, trust_remote_code=trust_remote_code)
        config = _greedy(reference.generation_config, model.manifest, new_tokens)
        return [_generate(reference, config, prompt) for prompt in prompts]

    # One whole model at a time, where what was compared before is no longer.
    close_all(model.engines, model.spec)
    expected = continue_prompts()
    gc.collect()
    trim_heap()
    return [*checks, _compare_text(model, prompts, expected)]


def verify_defaults(manifest: Manifest, checkpoint: Checkpoint) -> Check:
    """Compares the bundle's defaults of generation with what transformers reads.

    Raises:
        CheckpointError: transformers can't open generation_config.json.
    """
    from transformers import GenerationConfig

    directory = os.fspath(checkpoint.directory)
    with _speaking(checkpoint.directory, "generation_config.json"):
        try:
            said = GenerationConfig.from_pretrained(directory, local_files_only=True)
        except OSError:  # old checkpoints say it there
            said = GenerationConfig.from_pretrained(directory, "config.json", local_files_only=True)
    return _equal("generation: defaults", _other_defaults(said, manifest))


def _other_defaults(said: Any, manifest: Manifest) -> int:
    """How many values of the bundle are others than transformers reads."""
    ignored, own, unset = manifest.model.ignored_fields, manifest.generation, type(said)()
    # Where it names none, config.json's count here, and text has no end in transformers.
    ends = None if "eos_token_id" in ignored else said.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    different = int(ends != [None] and ends != list(manifest.model.spec.eos_token_ids))
    for name in GenerationDefaults.model_fields:
        value, theirs = getattr(own, name), getattr(said, name, None)
        if not value:
            # transformers 4 has values of its own for what isn't said; 0 is as good as nothing.
            different += name not in ignored and theirs not in (None, 0, [], getattr(unset, name))
        else:
            different += theirs != (list(value) if isinstance(value, tuple) else value)
    return different


def _prompts(manifest: Manifest, token_ids: Int32) -> tuple[list[list[int]], int]:
    """What is continued, and by how many tokens."""
    most = manifest.cache.max_length
    prompt_tokens = max(1, min(PROMPT_TOKENS, most // 2))
    new_tokens = min(NEW_TOKENS, most + 1 - prompt_tokens)
    return token_ids[:, :prompt_tokens].tolist(), new_tokens


def _compare_text(model: Model, prompts: list[list[int]], continued: list[Continued]) -> Check:
    """Greedy tokens: the difference is by how much transformers prefers its own first other one."""
    manifest = model.manifest
    arithmetic = arithmetic_of_model(model)
    penalty = manifest.generation.repetition_penalty or 1.0
    difference = allowed = 0.0
    for prompt, (scores, expected) in zip(prompts, continued, strict=True):
        [completion] = model.generate(
            prompt, exit="full", max_new_tokens=len(expected), ignore_eos=True
        ).prompts
        for step, (token, other) in enumerate(zip(expected, completion.token_ids, strict=True)):
            score = scores[step]
            largest = float(np.abs(score[np.isfinite(score)]).max(initial=0))
            bound = TOLERANCES[arithmetic]["logits"].bound(largest)
            # Each of the two logits may be off by this much, and a penalty enlarges it.
            bound *= 2 * max(penalty, 1 / penalty)
            if token != other:
                gap = float(score[token] - score[other])
                if gap - bound >= difference - allowed:
                    difference, allowed = gap, bound
                break
            allowed = allowed or bound
    return Check(
        name="generate", max_abs_diff=difference, tolerance=allowed, passed=difference <= allowed
    )


def _greedy(config: Any, manifest: Manifest, new_tokens: int) -> Any:
    """A checkpoint's own settings, but for what the user ignored, greedy and of fixed length."""
    config = copy.deepcopy(config)
    unset = type(config)()
    for name in manifest.model.ignored_fields:
        if hasattr(unset, name):
            setattr(config, name, getattr(unset, name))
    changes = {"do_sample": False, "max_new_tokens": new_tokens, "max_length": None}
    changes |= {"eos_token_id": None, "pad_token_id": 0, "return_dict_in_generate": True}
    for name, value in {**changes, "output_scores": True}.items():
        setattr(config, name, value)
    return config


def _generate(reference: Any, config: Any, prompt: list[int]) -> Continued:
    """What transformers makes of a prompt."""
    import torch

    ids = torch.tensor([prompt])
    reference.generation_config = config
    with quiet_transformers(), torch.inference_mode():
        made = reference.generate(ids, attention_mask=torch.ones_like(ids))
    scores = [each[0].float().numpy() for each in made.scores]
    return scores, made.sequences[0, len(prompt) :].tolist()


def _equal(name: str, different: int) -> Check:
    return Check(name=name, max_abs_diff=float(different), tolerance=0, passed=different == 0)


@contextmanager
def _speaking(checkpoint: Path, what: str) -> Iterator[None]:
    """What transformers says of a checkpoint that it can't open is an error in one line."""
    try:
        with quiet_transformers(), tokenizer.native_messages_dropped():
            yield
    except BaseException as error:  # Rust's panics are no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"transformers can't open the {what} of {checkpoint}: {first}",
            hint="a bundle can't be compared with it; --skip-verification builds without",
        ) from error
