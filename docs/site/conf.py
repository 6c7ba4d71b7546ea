"""The documentation site: `sphinx-build -W --keep-going -b html docs/site build/site`."""

import os
import re
import sys
from pathlib import Path

SITE = Path(__file__).resolve().parent
ROOT = SITE.parents[1]
sys.path.insert(0, str(ROOT))

import efficient_densenet  # noqa: E402

project = author = "efficient_densenet"
release = efficient_densenet.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "alabaster"
html_theme_options = {"page_width": "1100px"}  # the README's tables are wide

autodoc_inherit_docstrings = False  # nn.Module's own are about nn.Module
autodoc_member_order = "bysource"
myst_heading_anchors = 3
# A role that leads nowhere is a warning, but for types other than those of the package itself.
nitpicky = True
nitpick_ignore_regex = [("py:class", r"(?!efficient_densenet\.\w+$).*"), ("py:exc", r".*")]


def point_links_here(app, included: Path, parent: str, content: list[str]) -> None:
    """Links of a file of the repository lead to its page here, or else to a copy of the file."""
    folder = (SITE / included).resolve().parent

    def replace(link: re.Match) -> str:
        target, page = folder / link[1], SITE / Path(link[1]).name.lower()
        if not target.is_file():
            return link[0]  # a URL; otherwise MyST warns
        return f"]({page.name})" if page.is_file() else f"](path:{os.path.relpath(target, SITE)})"

    content[0] = re.sub(r"\]\(([^)#\s]+)\)", replace, content[0])


def without_fields_of_tuples(app, what, name, member, skip, options) -> bool | None:
    """A named tuple's docstring describes its fields; theirs say "Alias for field number 0"."""
    return True if type(member).__name__ == "_tuplegetter" else None


def setup(app) -> None:
    app.connect("include-read", point_links_here)
    app.connect("autodoc-skip-member", without_fields_of_tuples)
