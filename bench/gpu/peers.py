"""transformers at the same shapes on the same GPU: `python -m bench.gpu.peers --out peers.json`.

Eager, and with torch.compile (CUDA graphs) and a static cache; fp16, random weights. Needs torch
and transformers; run it beside bench.gpu.tensorrt, on the same machine.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from bench.gpu.shapes import SHAPES
from ojfa_export.models.spec import ModelSpec
from ojfa_export.system.atomic import write_atomically

WARMUP = 8


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Times transformers on this GPU.")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["llama2-7b"])
    parser.add_argument("--past", type=int, nargs="+", default=[512])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--tokens", type=int, default=30, help="timed tokens of each setting")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(arguments)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    gpu = torch.cuda.get_device_name() if options.device == "cuda" else options.device
    rows = []
    for name in options.shapes:
        model = make_model(SHAPES[name], options.device)
        for batch in options.batch:
            for past in options.past:
                for kind in ("eager", "torch.compile"):
                    samples = decode(model, kind, batch, past, options)
                    rows.append(
                        {
                            "shape": name,
                            "peer": f"transformers, {kind}",
                            "batch": batch,
                            "past": past,
                            "ms_median": float(np.median(samples)),
                            "ms_p95": float(np.percentile(samples, 95)),
                            "samples_ms": [round(sample, 4) for sample in samples],
                        }
                    )
                    print({k: v for k, v in rows[-1].items() if k != "samples_ms"}, flush=True)
                    result = {"gpu": gpu, "versions": versions, "peers": rows}
                    write_atomically(options.out, (json.dumps(result) + "\n").encode())


def make_model(spec: ModelSpec, device: str, dtype: torch.dtype = torch.float16) -> Any:
    """The shape as a transformers model, with its own random weights."""
    if spec.family == "gpt2":
        config = transformers.GPT2Config(
            n_embd=spec.hidden_size,
            n_layer=spec.blocks,
            n_head=spec.heads,
            vocab_size=spec.vocab_size,
            n_positions=spec.max_positions,
        )
    else:
        kind = {"llama": transformers.LlamaConfig, "phi3": transformers.Phi3Config}[spec.family]
        config = kind(
            hidden_size=spec.hidden_size,
            intermediate_size=spec.intermediate_size,
            num_hidden_layers=spec.blocks,
            num_attention_heads=spec.heads,
            num_key_value_heads=spec.kv_heads,
            vocab_size=spec.vocab_size,
            max_position_embeddings=spec.max_positions,
            pad_token_id=0,
        )
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


@torch.inference_mode()
def decode(
    model: Any, kind: str, batch: int, past: int, options: argparse.Namespace
) -> list[float]:
    """Milliseconds of each greedy step after `past` tokens, the next token on the host included."""
    device = options.device
    length = past + WARMUP + options.tokens
    cache = transformers.StaticCache(config=model.config, max_cache_len=length)
    ids = torch.randint(0, model.config.vocab_size, (batch, past), device=device)
    positions = torch.arange(past, device=device)
    call = {"past_key_values": cache, "use_cache": True}
    logits = model(ids, position_ids=positions[None], logits_to_keep=1, **call).logits

    def step(token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        output = model(token, position_ids=position[None], **call)
        return torch.argmax(output.logits[:, -1], dim=-1, keepdim=True)

    run: Callable[..., torch.Tensor] = step
    if kind == "torch.compile":
        torch._dynamo.reset()
        run = torch.compile(step, mode="reduce-overhead", fullgraph=True)
    token = torch.argmax(logits[:, -1], dim=-1, keepdim=True)
    samples = []
    for index in range(WARMUP + options.tokens):
        position = torch.tensor([past + index], device=device)
        start = time.perf_counter()
        token = run(token, position).clone()
        token.tolist()
        if index >= WARMUP:
            samples.append((time.perf_counter() - start) * 1e3)
    return samples


if __name__ == "__main__":
    main()
