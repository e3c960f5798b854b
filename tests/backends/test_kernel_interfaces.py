"""What launches a kernel, in both runtimes, agrees with the kernel: parameters and constants.

The stand-ins for a GPU take what they are given; a GPU would read an argument's neighbour.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ojfa_export.backends.cuda.sources import SOURCES, source_directory
from ojfa_export.backends.tensorrt import attention

ENGINES = Path(__file__).parents[2] / "engines"
BACKEND = ENGINES / "backends" / "tensorrt"
# Read as text: the module needs the driver's bindings.
NARROW = (Path(attention.__file__).parent / "narrow.py").read_text()


def parameters_of_kernels() -> dict[str, list[str]]:
    """Types of each kernel's parameters, without `const`; of those that macros name, by parts."""
    found = {}
    pattern = r"__global__ void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+(?:##\w+)*)\(([^)]*)\)"
    for source in SOURCES:
        text = (source_directory() / source).read_text().replace("\\\n", "\n")
        for name, parameters in re.findall(pattern, text):
            found[name] = kinds(parameters)
    return found


def kinds(parameters: str) -> list[str]:
    """Pointer, or the type's name."""
    types = [each.replace("const ", "").split() for each in parameters.split(",") if each.strip()]
    return ["pointer" if "*" in "".join(each) else each[0] for each in types]


def parameters_of_the_stand_in() -> dict[str, list[str]]:
    """The same of C++'s stand-in for a GPU, by the names that kernels are found by there."""
    found = {}
    for file in ("kernels.cpp", "products.cpp"):
        text = (ENGINES / "tests" / "stand_in" / file).read_text()
        inline = r'\{"(\w+)",\s*kernel\(\+\[\]\(Program&[^,)]*(?:,\s*const Launch&[^,)]*)?,?'
        for name, parameters in re.findall(inline + r"\s*([^)]*)\)", text):
            found[name] = kinds(parameters)
        for name, function in re.findall(r'\{"(\w+)", kernel\((\w+)\)\}', text):
            declared = rf"void {function}\(Program&[^,]*, const Launch&[^,]*, ([^)]*)\)"
            [parameters] = re.findall(declared, text)
            found[name] = kinds(parameters)
    return found


def test_the_stand_in_in_cpp_takes_what_kernels_do():
    kernels, stand_in = parameters_of_kernels(), parameters_of_the_stand_in()
    kernels |= {"attention": kernels["NAME"], "wide_attention": kernels.pop("NAME")}
    for name in list(kernels):
        kernels[re.sub(r"_?##\w+", "", name)] = kernels.pop(name)
    same = [name for name in stand_in if name in kernels]
    assert {"attention", "wide_attention", "narrow_linear", "norm_narrow_up", "choose"} <= {*same}
    assert {name: stand_in[name] for name in same} == {name: kernels[name] for name in same}


def constant(text: str, name: str) -> int:
    """A number that a source names."""
    [found] = re.findall(rf"\b{name} = (\d+)\b", text)
    return int(found)


@pytest.mark.parametrize("name", ["WARPS", "TILE"])
def test_narrow_products_are_launched_with_the_kernels_numbers(name):
    text = (source_directory() / "narrow_linear.cu").read_text()
    wanted = constant(text, {"WARPS": "NARROW_WARPS", "TILE": "NARROW_ROWS"}[name])
    assert constant(NARROW, name) == wanted
    assert constant((BACKEND / "narrow.cpp").read_text(), name) == wanted


def test_batches_of_narrow_products():
    text = (source_directory() / "narrow_linear.cu").read_text()
    [(few, many)] = re.findall(r"NARROW_BATCH = GROUPS == 1 \? (\d+) : (\d+)", text)
    assert f"BATCH = {{1: {few}, 2: {many}}}" in NARROW
    assert f"groups(tokens) == 1 ? {few} : {many}" in (BACKEND / "narrow.cpp").read_text()


@pytest.mark.parametrize("way", [attention.NARROW, attention.WIDE], ids=lambda way: way.kernel)
def test_ways_of_attention(way):
    text = (source_directory() / "attention.cu").read_text()
    kind = {"attention": "Narrow", "wide_attention": "Wide"}[way.kernel]
    body = text[text.index(f"struct {kind} {{") :].partition("};")[0]
    assert f"FITTING_WARPS<{way.row_bytes}, {way.most_warps}>" in body
    assert constant(body, "STAGES") == way.stages
    if way is attention.WIDE:
        assert constant(text[text.index("struct Told") :], "SPLITS") == way.most_splits
    numbers = [way.row_bytes, way.most_warps, way.stages, way.resident, way.most_splits]
    written = ", ".join(map(str, numbers))
    assert f'{{"{way.kernel}", {written}}}' in (BACKEND / "attention.cpp").read_text()
