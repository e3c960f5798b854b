"""The kinds of jump that can be trained: one small file each, and a line here."""

from __future__ import annotations

from ojfa_export.training.kinds.block import Block
from ojfa_export.training.kinds.draft import Draft
from ojfa_export.training.kinds.jump import Jump
from ojfa_export.training.kinds.mlp import Mlp
from ojfa_export.training.kinds.residual import Residual

KINDS: dict[str, type[Jump]] = {"mlp": Mlp, "residual": Residual, "block": Block, "draft": Draft}
