"""Greedy tokens of a bundle at full depth against transformers on the checkpoint, in fp32.

    python -m bench.quality.greedy smollm2.ojfa smollm2 --out bench/results/greedy-smollm2.json

Continues the prompts of greedy_prompts.jsonl (chats by the checkpoint's template, code, languages,
emoji, 1,500 tokens at once) by 128 tokens, ends of text ignored. Where tokens part, what follows
is of another text and is not compared; the gap there is between transformers' largest logit and
that of the bundle's token.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.commit import commit
from ojfa_export.planning.machine import describe_machine
from ojfa_export.runtime.model import Model, load

PROMPTS = Path(__file__).with_name("greedy_prompts.jsonl")
ROOT = Path(__file__).resolve().parents[2]
NEW_TOKENS = 128
PACKAGES = ("numpy", "onnxruntime", "tokenizers", "torch", "transformers")


@dataclass(frozen=True)
class Parting:
    """Where a continuation leaves transformers' one.

    Attributes:
        at: How many tokens are the same.
        ours: The bundle's next token.
        theirs: transformers' next token.
        top_gap: Between transformers' two largest logits there.
        gap: Between its largest one and that of the bundle's token.
    """

    at: int
    ours: int
    theirs: int
    top_gap: float
    gap: float


@dataclass(frozen=True)
class Compared:
    """One prompt.

    Attributes:
        tokens: Of the prompt, as transformers' tokenizer has it.
        same_prompt: Whether the bundle's tokenizer, and its template, give the same.
        parting: None where all new tokens are equal.
    """

    name: str
    tokens: int
    same_prompt: bool
    parting: Parting | None


class Reference:
    """transformers on a checkpoint, in fp32."""

    def __init__(self, checkpoint: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self.model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        # Models end where they like; all tokens that were asked for are compared.
        self.model.generation_config.eos_token_id = None

    def prompt(self, asked: dict[str, Any]) -> list[int]:
        """Token ids of a line of the file."""
        if "messages" in asked:
            text = self.tokenizer.apply_chat_template(
                asked["messages"], tokenize=False, add_generation_prompt=True
            )
            return list(self.tokenizer(text, add_special_tokens=False).input_ids)
        return list(self.tokenizer(text_of(asked)).input_ids)[: asked.get("tokens")]

    def generate(self, prompt: list[int], count: int) -> list[int]:
        """Its greedy tokens."""
        ids = torch.tensor([prompt])
        found = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
        )
        return list(found[0, len(prompt) :].tolist())

    @torch.no_grad()
    def logits(self, ids: list[int]) -> torch.Tensor:
        """After the last of these tokens, without a cache."""
        found: torch.Tensor = self.model(torch.tensor([ids]), logits_to_keep=1).logits[0, -1]
        return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Compares, and writes one JSON file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--new", type=int, default=NEW_TOKENS, help="tokens of each prompt")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    begun_at = commit()  # before anybody changes files meanwhile
    model, reference = load(options.bundle), Reference(options.checkpoint)
    rows = [compare(model, reference, asked, options.new) for asked in read_prompts()]
    partings = [row.parting for row in rows if row.parting]
    result = {
        "commit": begun_at,
        "machine": describe_machine(PACKAGES),
        "model": model.manifest.model.name,
        "precision": model.manifest.precision,
        "tokens_each": options.new,
        "prompts": len(rows),
        "prompts_equal": len(rows) - len(partings),
        "prompts_tokenized_alike": sum(row.same_prompt for row in rows),
        "tokens_compared": sum(row.parting.at + 1 if row.parting else options.new for row in rows),
        "largest_gap": max((each.gap for each in partings), default=0.0),
        "rows": [asdict(row) for row in rows],
    }
    print(json.dumps({name: value for name, value in result.items() if name != "rows"}, indent=1))
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def read_prompts() -> list[dict[str, Any]]:
    """The lines of the file."""
    lines = PROMPTS.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def compare(model: Model, reference: Reference, asked: dict[str, Any], count: int) -> Compared:
    """Continues a prompt in both ways."""
    prompt = reference.prompt(asked)
    if "messages" in asked:
        ours = model.encode(model.render(asked["messages"]))
    else:
        ours = model.tokenizer.encode(text_of(asked)).ids[: asked.get("tokens")]
    result = model.generate(prompt, exit="full", max_new_tokens=count, ignore_eos=True)
    parting = find_parting(
        reference, prompt, result.prompts[0].token_ids, reference.generate(prompt, count)
    )
    row = Compared(asked["name"], len(prompt), ours == prompt, parting)
    print(row, flush=True)
    return row


def text_of(asked: dict[str, Any]) -> str:
    """The text of a line that is no chat; what it takes from a file, whole."""
    if "file" in asked:
        return Path(ROOT, asked["file"]).read_text(encoding="utf-8")
    return str(asked["text"])


def find_parting(
    reference: Reference, prompt: list[int], ours: Sequence[int], theirs: Sequence[int]
) -> Parting | None:
    """The first difference, if there is one.

    Raises:
        ValueError: One has fewer tokens.
    """
    for at, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        if our != their:
            logits = reference.logits([*prompt, *theirs[:at]])
            first, second = logits.topk(2).values.tolist()
            return Parting(at, our, their, first - second, first - float(logits[our]))
    return None


if __name__ == "__main__":
    main()
