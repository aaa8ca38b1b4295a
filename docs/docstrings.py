"""Docstrings as Markdown: formulas and examples become code. They are written for `help(...)`, without fences."""

import re

import griffe

FORMULA = re.compile(r"^(?P<lead>\S.*?:) {3,}(?P<formula>\S.*)$")
SEVERAL = re.compile(r"^    (?:\w+, )+\w+:", flags=re.M)


def as_markdown(text: str) -> str:
    """The same text, with its formulas and its `>>>` examples in fences."""
    done: list[str] = []
    for block in re.split(r"\n{2,}", text):
        lines = block.split("\n")
        formula = FORMULA.match(lines[0])
        if block.lstrip().startswith(">>> "):
            done.append(f"```pycon\n{block}\n```")
        elif formula:
            rest = [f"    {line.strip()}" for line in lines[1:] if line.strip()]
            done.append("\n".join([formula["lead"], "", "```text", formula["formula"], *rest, "```"]))
        elif block.startswith("Attributes:"):  # griffe takes b of "a, b: what" for a type, unless they are one word
            done.append(SEVERAL.sub(lambda names: names[0].replace(", ", ",\N{NO-BREAK SPACE}"), block))
        else:
            done.append(block)
    return "\n\n".join(done)


class Fences(griffe.Extension):
    """Applies `as_markdown` to every docstring."""

    def on_instance(self, *, obj: griffe.Object, **_: object) -> None:
        """Called by griffe, for every object it has read."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
