"""Write the table of components in README.md from the catalog.

python scripts/readme_table.py          # rewrite it
python scripts/readme_table.py --check  # exit with 1 if it is out of date
"""

from __future__ import annotations

import sys
from pathlib import Path

import zoo
from zoo.catalog import PAPERS
from zoo.registry import rows

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = (
    "<!-- components: written by scripts/readme_table.py from the catalog -->\n",
    "<!-- end of components -->\n",
)


def table() -> str:
    """One row a component, by kind."""
    lines = ["| kind | name | what | class | paper |", "| --- | --- | --- | --- | --- |"]
    for row in sorted(rows(), key=lambda row: (zoo.registry.KINDS.index(row.kind), row.name)):
        if row.dist == "paperzoo":
            source = PAPERS[row.paper].cited(row.equations) if row.paper else ""
            cls = row.target.rpartition(":")[2]
            lines.append(f"| {row.kind} | `{row.name}` | {row.summary} | `zoo.{cls}` | {source} |")
    return "\n".join(lines) + "\n"


def rewritten(text: str) -> str:
    """The README with the table of this catalog."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + table() + END + after


if __name__ == "__main__":
    current = README.read_text()
    if "--check" in sys.argv[1:]:
        sys.exit(current != rewritten(current))
    README.write_text(rewritten(current))
