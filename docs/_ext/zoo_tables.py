"""The directive `zoo-table`: a table of tables.py in a page.

```{zoo-table} components
```
"""

from __future__ import annotations

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from tables import TABLES


class ZooTable(SphinxDirective):
    """Its argument is a key of `TABLES`."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        if name not in TABLES:
            raise self.error(f"zoo-table knows {', '.join(TABLES)}, got {name!r}")
        self.env.note_reread()  # what it shows lies outside the page
        return self.parse_text_to_nodes(TABLES[name]())


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("zoo-table", ZooTable)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
