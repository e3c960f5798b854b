"""What the onnxruntime-cuda backend records: nothing that would call the host at each replay.

Operators that bring small arrays from the host free them by a callback: none may be recorded.
"""

from __future__ import annotations

import os

import pytest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        os.environ.get("OJFA_GPU_BACKEND") != "onnxruntime-cuda", reason="of one backend"
    ),
]


def test_recorded_steps_hold_no_callbacks(case, monkeypatch):
    from ojfa_export.backends.cuda import device

    driver, seen = device.driver, []
    instantiate = driver.cuGraphInstantiate

    def look(graph, flags):
        *_, count = device.check(driver.cuGraphGetNodes(graph))
        nodes, _ = device.check(driver.cuGraphGetNodes(graph, count))
        seen.append([device.check(driver.cuGraphNodeGetType(node)) for node in nodes])
        return instantiate(graph, flags)

    monkeypatch.setattr(driver, "cuGraphInstantiate", look)
    session = case.session()
    session.advance(case.expected["token_ids"][0, :5].tolist())
    for token in range(4):
        session.advance([token])
    assert seen
    assert all(len(nodes) > case.spec.blocks for nodes in seen[-1:])
    assert driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_HOST not in {
        n for nodes in seen for n in nodes
    }
