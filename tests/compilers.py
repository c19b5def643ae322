"""Compilers of plugins: those that are installed here, found without asking for more than a version.

A C compiler is `ziglang`, a package of PyPI, or a `clang` with its linker for WebAssembly; Rust and TinyGo are theirs.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples" / "plugins"
OPTIONS = ("-Os", "-nostdlib", "-Wl,--no-entry,-z,stack-size=65536")
NO_C = "no compiler of C for WebAssembly: pip install ziglang, or clang and lld"


@cache
def c_compiler(language: str = "c") -> tuple[str, ...] | None:
    """Return the command that compiles C, or C++, for WebAssembly without a library; `None` if there is none."""
    if importlib.util.find_spec("ziglang") is not None:
        found = sys.executable, "-m", "ziglang", {"c": "cc", "c++": "c++"}[language], "-target", "wasm32-freestanding"
        return (*found, "-x", language)
    clang = shutil.which({"c": "clang", "c++": "clang++"}[language])
    if clang is None or not any(shutil.which(name) for name in ("wasm-ld", "lld")):
        return None
    targets = subprocess.run([clang, "--print-targets"], capture_output=True, text=True, check=False).stdout
    return (clang, "--target=wasm32", "-x", language) if "wasm32" in targets else None


def compiled(source: str | Path, directory: Path, *more: str, language: str = "c") -> bytes:
    """Compile a plugin, a text or a file, as the pages say, every warning an error; return its code."""
    if isinstance(source, str):
        source, text = directory / "plugin.c", source
        source.write_text(text)
    command = c_compiler(language)
    assert command is not None
    target = directory / "plugin.wasm"
    # A folder of its own for what Zig keeps: it would be in the home directory of whoever runs the tests.
    environment = {**os.environ, "ZIG_LOCAL_CACHE_DIR": str(directory / "zig")}
    finished = subprocess.run(
        [*command, "-Wall", "-Wextra", "-Wconversion", "-Werror", "-I", str(EXAMPLES), *OPTIONS, *more]
        + ["-o", str(target), str(source)],
        cwd=directory, env=environment, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    return target.read_bytes()
