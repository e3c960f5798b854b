"""A module `cuda.bindings.nvrtc` whose programs are the macros that they were given."""

from __future__ import annotations

import enum
import json
from types import ModuleType
from typing import Any

from stand_in.driver import poke


def make_compiler() -> ModuleType:
    """The module."""
    module: Any = ModuleType("cuda.bindings.nvrtc")
    result = enum.IntEnum("nvrtcResult", {"NVRTC_SUCCESS": 0, "NVRTC_ERROR_COMPILATION": 6})
    done = result.NVRTC_SUCCESS

    def compile_program(program: dict[str, bytes], _: int, options: list[bytes]) -> tuple[Any]:
        given = [option.decode() for option in options if option.startswith(b"-D")]
        pairs = (option.removeprefix("-D").split("=") for option in given)
        program["code"] = json.dumps({name: int(value) for name, value in pairs}).encode()
        return (done,)

    def get_code(program: dict[str, bytes], code: bytes) -> tuple[Any]:
        poke(code, program["code"])
        return (done,)

    module.nvrtcResult = result
    module.nvrtcCreateProgram = lambda *_: (done, {})
    module.nvrtcCompileProgram = compile_program
    module.nvrtcGetCUBINSize = lambda program: (done, len(program["code"]))
    module.nvrtcGetCUBIN = get_code
    module.nvrtcDestroyProgram = lambda _: (done,)
    return module
