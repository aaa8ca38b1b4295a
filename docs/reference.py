"""Every public name has its place in the reference: the build warns, and so ends, where one has none."""

import ast
import logging
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def public() -> Iterator[tuple[str, str]]:
    """Module and name of everything in an `__all__` of a module that is no part of another."""
    for path in sorted((ROOT / "flexnorm").glob("*.py")):
        module = "flexnorm" if path.stem == "__init__" else f"flexnorm.{path.stem}"
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and [ast.unparse(t) for t in node.targets] == ["__all__"]:
                yield from ((module, name) for name in ast.literal_eval(node.value))


def shown() -> set[str]:
    """What the pages of docs/api show."""
    pages = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    return set(re.findall(r"^::: (\S+)$", pages, flags=re.M))


def missing() -> list[str]:
    """Public names that no page shows. What `flexnorm` itself exports stands there, or under the file it is from."""
    there, core = shown(), {name for module, name in public() if module == "flexnorm"}
    last = {identifier.rsplit(".", 1)[1] for identifier in there}
    return [f"{m}.{n}" for m, n in public() if f"{m}.{n}" not in there and not (n in core and n in last)]


def on_pre_build(**_: object) -> None:
    """Called by MkDocs."""
    for name in missing():
        logging.getLogger("mkdocs.hooks").warning("docs/api does not show %s", name)
