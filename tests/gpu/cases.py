"""What the cases of the GPU tests are made of."""

SEED = 23
LENGTH, SEQUENCES, EXIT = 48, 2, 2
RANK = 7
BUNDLES = "bundles"  # the folder beside the cases
# One of each kind of norm, activation, position, head grouping, bias and window, by precision.
CASES = {
    "llama-gqa": "fp32",
    "llama-gqa-fp16": "fp16",
    "llama-mqa": "fp32",
    "llama-attention-bias": "fp32",
    "llama-head-dim": "fp32",
    "gpt2": "fp32",
    "gpt2-fp16": "fp16",
    "gpt2-gelu": "fp32",
    "gpt2-inverse-layer-scale": "fp32",
    "phi3-sliding-window": "fp32",
    "phi3-longrope": "fp32",
    "phi3-partial-rotary": "fp32",
    # The same with a residual shortcut; its rank is no multiple of what a kernel loads at once.
    "llama-gqa-residual": "fp32",
    "gpt2-residual-fp16": "fp16",
    # And with an MLP, in the kernels of a block's.
    "llama-gqa-mlp": "fp32",
    "llama-gqa-mlp-fp16": "fp16",
    "gpt2-mlp-fp16": "fp16",
    # And with blocks behind exits, one for all or one each.
    "llama-gqa-block": "fp32",
    "qwen3-block": "fp32",
    "llama-gqa-block-fp16": "fp16",
    "gpt2-block-fp16": "fp16",
    "gemma2-block-fp16": "fp16",
    "phi3-longrope-block-fp16": "fp16",
    "mistral-sliding-window-fp16": "fp16",
    "qwen2-fp16": "fp16",
    # Grouped heads with a scale of their own; with LongRoPE of three quarters of a head.
    "granite-tied-fp16": "fp16",
    "phi4-mini-fp16": "fp16",
    # Norms of queries and keys; blocks that rotate nothing.
    "qwen3-fp16": "fp16",
    "qwen3": "fp32",
    "smollm3-fp16": "fp16",
    # LayerNorm with a gated MLP.
    "stablelm": "fp32",
    "stablelm-mlp-fp16": "fp16",
    # Norms before and after, softcaps, windows and rotations by block.
    "gemma2": "fp32",
    "gemma2-fp16": "fp16",
    "gemma3_text-fp16": "fp16",
    "smollm3-sliding-window-fp16": "fp16",
    # ONNX Runtime's fused attention is there in fp16 only.
    "llama-mqa-fp16": "fp16",
    "phi3-sliding-window-fp16": "fp16",
    "phi3-longrope-fp16": "fp16",
    "phi3-partial-rotary-fp16": "fp16",
    "gpt2-inverse-layer-scale-fp16": "fp16",
}
CASES |= {
    f"{name}-bf16": "bf16"
    for name in (
        *("llama-gqa", "llama-gqa-mlp", "gpt2", "gpt2-residual", "mistral-sliding-window"),
        *("qwen3", "smollm3", "stablelm-mlp", "phi3-longrope", "gemma2", "gemma3_text"),
        *("qwen3-block", "mistral-sliding-window-block"),
    )
}
# Those whose exits are checked by a head of some tokens: folded, behind each kind of jump, a block.
CHECKED = {"qwen3", "gpt2-fp16", "llama-gqa-bf16", "gemma2", "gpt2-residual-fp16", "llama-gqa-mlp"}
CHECKED |= {"llama-gqa-mlp-fp16", "stablelm-mlp-bf16", "qwen3-block", "llama-gqa-block-fp16"}
# Those with a block for each exit.
EACH = {"qwen3-block", "gpt2-block-fp16", "qwen3-block-bf16"}
# Weights of four and eight bits, in groups of 32.
CASES |= {
    "llama-gqa-int4-fp16": "fp16",
    "llama-gqa-residual-int4-fp16": "fp16",
    "gpt2-int4-bf16": "bf16",
    "qwen3-int8-fp16": "fp16",
    "gemma2-int8-bf16": "bf16",
    "llama-gqa-residual-fp8-fp16": "fp16",
    "qwen3-fp8-bf16": "bf16",
}
# Those that also have a draft layer: with a head of its own, and with the model's.
DRAFTS = {"llama-gqa": True, "llama-gqa-fp16": True, "gpt2-fp16": False, "qwen3-fp16": False}
DRAFTS |= {"llama-gqa-bf16": True, "gpt2-bf16": False}
# Of a draft layer's prompt, and of the chain after it.
DRAFT_PROMPT, DRAFTED = 20, 5
