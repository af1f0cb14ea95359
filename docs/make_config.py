"""Writes docs/config.md from pgjax/config.py: its fields, their defaults and the comments beside them."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
HEAD = """# Every recipe value

A recipe is one frozen `Recipe`; `configs/` has one file each. Any value can be overridden on the command line by its path, with dashes or
underscores: `pgjax train toy --grpo.optimizer.learning-rate 5e-4`. An unknown path is an error that names the nearest one. The resolved
recipe of a run is its `config.json`.

This page is made from `pgjax/config.py` by `python docs/make_config.py`.
"""


def page(source: str) -> str:
    lines, tree = source.splitlines(), ast.parse(source)
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}

    def table(name: str, path: str) -> list[str]:
        """The section of one class, then those of the classes that its fields hold; `path` is the prefix on the command line."""
        node = classes[name]
        about = ast.get_docstring(node)
        out = [f"## {path.rstrip('.') or 'Recipe'}", "", *([" ".join(about.split()), ""] if about else [])]
        rows, below = [], []
        for field in node.body:
            if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
                continue
            kind, key = ast.unparse(field.annotation), f"{path}{field.target.id}"
            if kind in classes:
                below += table(kind, f"{key}.")
            else:
                comment = lines[field.end_lineno - 1].partition("  # ")[2]
                rows.append(f"| `{key}` | `{kind}` | `{ast.unparse(field.value)}` | {comment} |".replace(" | None`", " \\| None`"))
        if rows:
            out += ["| value | type | default | |", "|---|---|---|---|", *rows, ""]
        return out + below

    return "\n".join([HEAD, *table("Recipe", "")]).rstrip() + "\n"


if __name__ == "__main__":
    (ROOT / "docs" / "config.md").write_text(page((ROOT / "pgjax" / "config.py").read_text()))
