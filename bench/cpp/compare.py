"""The C++ runtime beside the Python one.

python -m bench.cpp.compare --build engines/build --out FILE

On a machine with an NVIDIA GPU: tokens and exits of both, ms per token in turns, the host's part of
a token, loading against the disk, several sessions at once, and what thousands of generations
leave. Written to one JSON file with the machine, versions, commit and raw samples.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.commit import commit
from bench.cpp.bundle import write_bundle
from bench.cpp.loading import loading
from bench.cpp.turns import Generated, InCpp, in_python
from bench.cpp.ways import SAMPLED, Way, every_exit, ways
from bench.gpu.clock import replay_time
from bench.gpu.machine import nvidia_smi
from bench.gpu.shapes import SHAPES
from ojfa_export import load
from ojfa_export.backends.tensorrt.backend import BACKEND
from ojfa_export.backends.tensorrt.engines import TensorRtEngines
from ojfa_export.decoding.sampling import Sampling
from ojfa_export.decoding.speculation import Speculation
from ojfa_export.runtime.model import Model
from ojfa_export.system.atomic import write_atomically

# Tokens of a generation that are not timed: recordings are made in them.
WARMUP = 24
# Positions beyond those that are timed: recordings are replayed to time them, and each moves on.
SPARE = 256
NEVER, ALWAYS = 2.0, -1.0  # thresholds of the largest probability


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measures the C++ runtime beside the Python one.")
    parser.add_argument("--build", type=Path, required=True, help="where the C++ runtime was built")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument(
        "--bundle",
        type=Path,
        nargs="*",
        default=[],
        help="trained ones with TensorRT engines; the first is timed, too",
    )
    parser.add_argument("--shape", choices=SHAPES, help="a random bundle of it for the times")
    parser.add_argument("--shape-bundle", type=Path, help="where that is or goes")
    parser.add_argument("--compared", type=int, default=1000, help="tokens that must be the same")
    parser.add_argument("--past", type=int, default=512, help="tokens of the prompt of a timing")
    parser.add_argument("--tokens", type=int, default=64, help="timed tokens of a turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--sessions", type=int, default=8)
    parser.add_argument("--generations", type=int, default=10_000)
    parser.add_argument("--commit", default=commit(), help="where this is no checkout")
    options = parser.parse_args(arguments)
    result: dict[str, Any] = {
        "commit": options.commit,
        "machine": {**BACKEND.versions(), "nvidia_smi": nvidia_smi()},
        "settings": {
            name: getattr(options, name)
            for name in ("compared", "past", "tokens", "turns", "sessions", "generations")
        },
    }

    def part(name: str, measure: Callable[[], Any]) -> None:
        try:
            result[name] = measure()
        except Exception as error:  # the other parts are worth having
            result[name] = {"error": f"{type(error).__name__}: {error}"}
            print(f"{name}: {result[name]['error']}", flush=True)
        write_atomically(options.out, (json.dumps(result) + "\n").encode())

    for bundle in options.bundle:
        part(f"same_{bundle.stem}", partial(same, options, bundle))
    for bundle in options.bundle[:1]:
        part("soak", partial(soak, options, bundle))
        part(f"times_{bundle.stem}", partial(times, options, bundle))
    if options.shape:
        with tempfile.TemporaryDirectory(prefix="ojfa-cpp-") as folder:
            bundle = options.shape_bundle or Path(folder) / f"{options.shape}.ojfa"
            length = options.past + WARMUP + options.tokens + SPARE
            part("written", partial(write_bundle, options.shape, bundle, length))
            part("loading", partial(loading, _program(options, "turns"), bundle))
            part(f"times_{options.shape}", partial(times, options, bundle))
            part("at_once", partial(at_once, options, bundle))


def same(options: argparse.Namespace, bundle: Path) -> dict[str, Any]:
    """Whether both give the same tokens at the same exits, and where they part if not."""
    model = _model(bundle)
    prompt = list(model.manifest.golden[0].prompt_token_ids)[:16]
    tokens = min(options.compared, model.manifest.cache.max_length - len(prompt))
    results: dict[str, Any] = {"tokens": tokens, "golden": len(model.manifest.golden), "ways": {}}
    cpp, results["golden_refused"] = _open(options, bundle)
    with cpp:
        for way in ways(model):
            ours, theirs = cpp.generate(way, prompt, tokens), in_python(model, way, prompt, tokens)
            differing = _differing(ours, theirs)
            results["ways"][way.name] = {
                "first_difference": differing,
                "tokens": {"cpp": len(ours.tokens), "python": len(theirs.tokens)},
                "blocks_run_mean": float(np.mean(theirs.blocks_run)),
                "distinct_tokens": len(set(theirs.tokens)),
                "ms_per_token": {"cpp": _mean(ours), "python": _mean(theirs)},
                "at_difference": None
                if differing is None
                else [
                    each.tokens[max(0, differing - 2) : differing + 3] for each in (ours, theirs)
                ],
            }
            print(f"{bundle.stem}, {way.name}: {results['ways'][way.name]}", flush=True)
    return results


def times(options: argparse.Namespace, bundle: Path) -> dict[str, Any]:
    """ms per token of several ways in turns, and the host's part of a token at a fixed exit."""
    model = _model(bundle)
    blocks = model.blocks
    rng = np.random.default_rng(3)
    past = min(options.past, model.manifest.cache.max_length - options.tokens - WARMUP - SPARE)
    if past < 1:
        return {"left out": f"it holds {model.manifest.cache.max_length} tokens"}
    prompt = rng.integers(0, model.spec.vocab_size, past).tolist()
    half = blocks // 2
    depths = sorted({1, blocks // 4, half, 3 * blocks // 4, blocks - 1, blocks})
    measured = [
        *(Way(f"exit {depth}", depth) for depth in depths),
        Way("a check after every block", every_exit(blocks, NEVER)),
        Way(f"a check after every block up to {half}", every_exit(half + 1, NEVER, ALWAYS)),
        Way("speculation", speculation=Speculation(half)),
        Way("drafts of 4", speculation=Speculation(half, 4)),
        Way("sampled", sampling=SAMPLED),
        Way(f"sampled, exit {half}", half, sampling=SAMPLED),
    ]
    rows = []
    cpp, _ = _open(options, bundle)
    with cpp:
        for way in measured:
            runs: dict[str, Callable[[Way, list[int], int], Generated]] = {
                "cpp": cpp.generate,
                "python": partial(in_python, model),
            }
            samples: dict[str, list[list[float]]] = {name: [] for name in runs}
            for turn in range(options.turns):
                for name in sorted(runs, reverse=bool(turn % 2)):  # neither is always first
                    ms = runs[name](way, prompt, WARMUP + options.tokens).ms[WARMUP:]
                    samples[name].append([round(each, 4) for each in ms])
            row = _row(way, samples)
            if isinstance(way.exit, int) and way.sampling == Sampling():
                row |= _host(model, row)
            rows.append(row)
            print(f"{bundle.stem}, {way.name}: {_said(row)}", flush=True)
    return {"past": past, "blocks": blocks, "ways": rows}


def at_once(options: argparse.Namespace, bundle: Path) -> dict[str, Any]:
    """Tokens per second of several sessions at once, full depth."""
    command = [_program(options, "bench"), bundle, "--exit", "full", "--no-golden"]
    command += ["--sessions", options.sessions, "--prompt-length", 128]
    command += ["--iterations", options.tokens]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    measured: dict[str, Any] = json.loads(done.stdout)
    print(f"at once: {measured['concurrent']}", flush=True)
    return measured


def soak(options: argparse.Namespace, bundle: Path) -> dict[str, Any]:
    """What many generations of several threads leave on the device and in the process."""
    command = [options.build / "tests" / "soak", bundle, "tensorrt"]
    command += [options.sessions, options.generations // 2]
    process = subprocess.Popen(
        list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    moments = []
    for line in process.stdout:
        moments.append({**json.loads(line), "device_used_mib": _used_mib()})
        print(f"soak: {moments[-1]}", flush=True)
        process.stdin.write("\n")
        process.stdin.flush()
    return {"status": process.wait(), "threads": options.sessions, "moments": moments}


def _open(options: argparse.Namespace, bundle: Path) -> tuple[InCpp, bool]:
    """The C++ runtime on a bundle, and whether it refused the golden tokens there."""
    program = _program(options, "turns")
    try:
        return InCpp(program, bundle), False
    except RuntimeError:
        return InCpp(program, bundle, "--no-golden"), True


def _differing(ours: Generated, theirs: Generated) -> int | None:
    """The first place where tokens or exits differ."""
    both = zip(
        zip(ours.tokens, ours.blocks_run, strict=True),
        zip(theirs.tokens, theirs.blocks_run, strict=True),
        strict=False,
    )
    return next((at for at, (one, other) in enumerate(both) if one != other), None)


def _row(way: Way, samples: dict[str, list[list[float]]]) -> dict[str, Any]:
    row: dict[str, Any] = {"way": way.name}
    for name, turns in samples.items():
        means = [float(np.mean(turn)) for turn in turns]
        row[name] = {
            "ms_per_token": float(np.median(means)),
            "ms_median": float(np.median(np.concatenate(turns))),
            "turns_ms_per_token": means,
            "samples_ms": turns,
        }
    row["cpp_over_python"] = row["cpp"]["ms_per_token"] / row["python"]["ms_per_token"]
    return row


def _host(model: Model, row: dict[str, Any]) -> dict[str, Any]:
    """Microseconds beside the recording's own, which both runtimes replay."""
    engines = model.engines
    assert isinstance(engines, TensorRtEngines)
    graph = engines.device.recorder.newest
    assert graph is not None
    engines.device.synchronize()
    device = replay_time(engines.device, graph)
    engines.mailbox.reset()  # the replayed answers are nobody's
    host = {name: row[name]["ms_median"] * 1e3 - device for name in ("cpp", "python")}
    return {"device_us": device, "host_us": host}


def _said(row: dict[str, Any]) -> str:
    said = f"{row['cpp']['ms_per_token']:.4f} ms, Python {row['python']['ms_per_token']:.4f}"
    said += f" ({row['cpp_over_python']:.3f})"
    if "host_us" in row:
        said += f"; host {row['host_us']['cpp']:.1f} us, Python {row['host_us']['python']:.1f}"
    return said


def _mean(generated: Generated) -> float:
    return float(np.mean(generated.ms[WARMUP:]))


def _model(bundle: Path) -> Model:
    model = load(bundle, backend="tensorrt")
    model.engines.load_blocks(model.blocks)
    return model


def _program(options: argparse.Namespace, name: str) -> Path:
    build: Path = options.build
    return build / "tools" / f"ojfa-{name}"


def _used_mib() -> int | None:
    """Of the GPU's memory, by all processes."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return int(done.stdout.split()[0]) if done.returncode == 0 else None


if __name__ == "__main__":
    main()
