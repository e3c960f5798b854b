"""Random draft layers, and a reference for them in torch."""

from __future__ import annotations

from typing import Any

import numpy as np

from ojfa_export.bundle.draft_shortcut import DraftShortcut


def random_draft(
    hidden: int = 16,
    vocabulary: int = 40,
    seed: int = 0,
    *,
    depths: tuple[int, ...] = (1, 2, 4),
    own_head: bool = True,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 6,
    width: int = 24,
) -> DraftShortcut:
    """A draft layer whose products keep the size of what goes in."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return (rng.normal(size=shape) * shape[0] ** -0.5).astype(np.float32)

    def norm() -> np.ndarray:
        return (1 + 0.3 * rng.normal(size=hidden)).astype(np.float32)

    frequent = np.sort(rng.permutation(vocabulary)[: max(1, vocabulary // 2)]).astype(np.int32)
    return DraftShortcut(
        depths=depths,
        fuse=normal(len(depths) * hidden, hidden),
        embedding_norm=norm(),
        state_norm=norm(),
        qkv=normal(2 * hidden, (heads + 2 * kv_heads) * head_dim),
        out=normal(heads * head_dim, hidden),
        mlp_norm=norm(),
        up=normal(hidden, 2 * width),
        down=normal(width, hidden),
        final_norm=norm(),
        head=normal(hidden, len(frequent)).T.copy() if own_head else None,
        tokens=frequent if own_head else None,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rope_theta=10_000.0,
        epsilon=1e-5,
    )


def by_torch(draft: DraftShortcut, memory: np.ndarray, embeddings: np.ndarray) -> np.ndarray:
    """The layer's outputs [T, H] by torch and transformers' rotation, in float64, past included."""
    import torch
    from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import (
        LlamaRotaryEmbedding,
        apply_rotary_pos_emb,
    )

    def tensor(array: Any) -> torch.Tensor:
        return torch.from_numpy(np.asarray(array, np.float64))

    def normed(x: torch.Tensor, weight: np.ndarray) -> torch.Tensor:
        return rms_norm(x, (len(weight),), tensor(weight), draft.epsilon)

    s, e, size = tensor(memory), tensor(embeddings), draft.head_dim
    both = torch.cat([normed(e, draft.embedding_norm), normed(s, draft.state_norm)], dim=-1)
    projected = linear(both, tensor(draft.qkv.T)).view(len(s), -1, size).transpose(0, 1)[None]
    q, k, v = projected.split([draft.heads, draft.kv_heads, draft.kv_heads], dim=1)
    config = LlamaConfig(
        hidden_size=size, num_attention_heads=1, head_dim=size, rope_theta=draft.rope_theta
    )
    cos, sin = LlamaRotaryEmbedding(config)(v, torch.arange(len(s))[None])
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    mixed = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    h = s + linear(mixed[0].transpose(0, 1).reshape(len(s), -1), tensor(draft.out.T))
    gate, up = linear(normed(h, draft.mlp_norm), tensor(draft.up.T)).chunk(2, dim=-1)
    return (h + linear(silu(gate) * up, tensor(draft.down.T))).numpy()
