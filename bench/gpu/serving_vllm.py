"""vLLM on what `bench.gpu.serving` measured: `python -m bench.gpu.serving_vllm` where vLLM is.

Random weights of the same shape, fp16, in this process, prefix caching off, CUDA graphs and
torch.compile as vLLM sets them by default. Times are taken where its engine gives a token's id.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.gpu.arrivals import Arrival, Times, poisson, summary

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float16",
}
PAST, SEQUENCES = 512, 64


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, and writes one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arrivals", type=Path, required=True, help="of bench.gpu.serving")
    parser.add_argument("--requests", type=int, default=192)
    options = parser.parse_args(arguments)
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_USE_FLASHINFER_SAMPLER="0",
        HF_HUB_OFFLINE="1",
        VLLM_NO_USAGE_STATS="1",
        VLLM_LOGGING_LEVEL="WARNING",
    )
    import torch
    import vllm

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(CONFIG))
        llm = vllm.LLM(
            folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="float16",
            max_model_len=2048,
            gpu_memory_utilization=0.7,
            enable_prefix_caching=False,
            max_num_seqs=SEQUENCES,
        )
        result: dict[str, Any] = {
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "gpu": torch.cuda.get_device_name(),
            "steady": [steady(llm, count) for count in (1, 4, 16, 32, 64)],
            "prompts": [prompts(llm, count) for count in (1, 16)],
        }
        at_once = poisson(float("inf"), options.requests, CONFIG["vocab_size"])  # type: ignore[arg-type]
        served(llm, at_once[: options.requests // 4])
        result["saturated"] = served(llm, at_once)
        listed = json.loads(options.arrivals.read_text(encoding="utf-8"))
        result["arrivals"] = served(llm, [Arrival(**each) for each in listed])
    options.out.write_text(json.dumps(result) + "\n", encoding="utf-8")
    for name in ("steady", "prompts", "saturated", "arrivals"):
        print(name, result[name], flush=True)


def steady(llm: Any, count: int) -> dict[str, Any]:
    """As of `bench.gpu.serving`."""
    samples = []
    for turn in range(4):
        few, many = (all_at_once(llm, count, new) for new in (4, 104))
        if turn:
            samples.append((many - few) * 1e3 / 100)
    return {"sequences": count, "ms_median": float(np.median(samples)), "samples_ms": samples}


def prompts(llm: Any, count: int) -> dict[str, Any]:
    """As of `bench.gpu.serving`."""
    samples = [1e3 * all_at_once(llm, count, 1) for _ in range(6)][1:]
    return {"prompts": count, "ms_median": float(np.median(samples)), "samples_ms": samples}


def all_at_once(llm: Any, count: int, new: int) -> float:
    """Seconds of some requests alike."""
    rng = np.random.default_rng()
    made = [{"prompt_token_ids": rng.integers(3, 32000, PAST).tolist()} for _ in range(count)]
    start = time.perf_counter()
    llm.generate(made, parameters(new), use_tqdm=False)
    return time.perf_counter() - start


def parameters(new: int) -> Any:
    """Greedy text of just so many tokens."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)


def served(llm: Any, arrivals: Sequence[Arrival]) -> dict[str, Any]:
    """Steps vLLM's engine while requests arrive, and notes when their tokens come."""
    engine, start = llm.llm_engine, time.perf_counter()
    times: dict[str, Times] = {}
    coming = list(enumerate(arrivals))
    while coming or engine.has_unfinished_requests():
        now = time.perf_counter()
        while coming and coming[0][1].at <= now - start:
            index, each = coming.pop(0)
            name = f"{len(times)}-{index}-{start}"
            times[name] = Times(time.perf_counter(), [])
            prompt = {"prompt_token_ids": each.prompt}
            engine.add_request(name, prompt, parameters(each.tokens))
        if not engine.has_unfinished_requests():
            time.sleep(max(0.0, coming[0][1].at - (time.perf_counter() - start)))
            continue
        for output in engine.step():
            new = len(output.outputs[0].token_ids) - len(times[output.request_id].tokens)
            times[output.request_id].tokens += [time.perf_counter()] * new
    return summary(list(times.values()))


if __name__ == "__main__":
    main()
