"""YAML files as plain values: no tags, no key twice, and no aliases that stand for more than they take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

LARGEST = 1 << 20  # bytes of a definition; what a person wrote has some hundred

VALUES = 10_000  # that a file may stand for, its aliases written out


class _UnlikeKeys(yaml.SafeLoader):
    """A loader that refuses a key which stands twice in one mapping, where YAML's takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping."""
        keys = [child.value for child, _ in node.value if isinstance(child, yaml.ScalarNode) and child.value != "<<"]
        double = next((key for key in keys if keys.count(key) > 1), None)
        if double is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the key {double!r:.60} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping that a file holds.

    Raises:
        ValueError: it is none, or larger than anything that a person writes.
    """
    try:
        with file.open("rb") as stream:
            content = stream.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise ValueError(f"{file} is larger than {LARGEST >> 20} MiB; a data definition is a few lines of YAML")
        tree = yaml.load(content.decode("utf-8-sig"), _UnlikeKeys)  # noqa: S506 - a SafeLoader
        _count(tree, [VALUES])
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not UTF-8; save it as UTF-8") from None
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}; correct its rights") from None
    except RecursionError:
        raise ValueError(f"{file} is nested without end; a data definition is a few lines of YAML") from None
    except yaml.YAMLError as error:
        reason = getattr(error, "problem", None) or str(error)
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark is not None else ""
        raise ValueError(f"{file} is not valid YAML{where}: {' '.join(str(reason).split())[:120]}; mend it") from None
    if not isinstance(tree, dict) or not tree:
        raise ValueError(f"{file} is no data definition; write keys and values, as path: and columns:")
    return tree


def _count(value: Any, left: list[int]) -> None:
    """Raises yaml.YAMLError where a tree, its aliases written out, has more values than are left."""
    left[0] -= 1
    if left[0] < 0:
        raise yaml.YAMLError(f"its aliases stand for more than {VALUES:,} values")
    if isinstance(value, dict):
        for key, item in value.items():
            _count(key, left)
            _count(item, left)
    elif isinstance(value, list):
        for item in value:
            _count(item, left)
