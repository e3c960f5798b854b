"""The verdicts of the comparison on made-up figures."""

from __future__ import annotations

import pytest

from bench.cpu.bars import Bar, bars, nonlinearity


def result(shape: str, exits: dict[int, float], peers: dict[str, float]) -> dict:
    chain = [{"name": f"chain-{n}", "blocks": n, "ms_median": ms} for n, ms in exits.items()]
    others = [{"name": name, "blocks": max(exits), "ms_median": ms} for name, ms in peers.items()]
    overhead = {"per_token_us": 40.0, "per_block_us": 16.0}
    return {"shape": shape, "past": {"128": chain + others}, "overhead": overhead}


def by_name(found: list[Bar]) -> dict[str, Bar]:
    return {bar.what: bar for bar in found}


def test_every_bar_has_its_value_and_verdict():
    exits = {1: 1.5, 2: 2.5, 3: 3.5, 4: 6.0}
    peers = {"monolithic": 5.0, "transformers": 12.0, "onnxruntime-genai": 5.0}
    found = by_name(bars(result("llama-1b-block", exits, peers)))
    assert found["chain / monolithic"].value == pytest.approx(1.2)
    assert found["chain / monolithic"].verdict == "falls short"
    assert found["transformers / chain"].value == pytest.approx(2.0)
    assert found["transformers / chain"].verdict == "pass"
    assert found["chain / genai"].value == pytest.approx(1.2)
    assert found["chain / genai"].limit == 1.1
    assert found["slowest exit up to 3/4 / genai"].value == pytest.approx(0.7)
    assert found["half depth / full depth"].value == pytest.approx(2.5 / 6)
    assert found["largest deviation of an exit from N blocks + head"].value < 1e-9
    assert found["step overhead per token, us"].verdict == "pass"
    assert found["step overhead per block, us"].verdict == "falls short"


def test_the_demo_has_its_own_limits_and_no_bar_against_the_monolithic_graph():
    peers = {"monolithic": 0.1, "transformers": 12.0, "onnxruntime-genai": 5.0}
    found = by_name(bars(result("demo", {1: 1.0, 2: 5.0}, peers)))
    assert "chain / monolithic" not in found
    assert found["transformers / chain"].limit == 3.0
    assert found["transformers / chain"].verdict == "falls short"
    assert found["chain / genai"].limit == 1.3


def test_a_family_that_genai_does_not_take_has_no_bar_against_it():
    found = by_name(
        bars(result("gpt2-small", {1: 1.0, 2: 2.0}, {"monolithic": 2, "transformers": 3}))
    )
    assert not any("genai" in what for what in found)
    assert found["chain / monolithic"].verdict == "pass"


def test_nonlinearity_is_the_largest_relative_deviation():
    line = {n: 0.2 + 0.7 * n for n in range(1, 9)}
    assert nonlinearity(line) < 1e-9
    assert nonlinearity({**line, 5: 1.2 * line[5]}) > 0.1
