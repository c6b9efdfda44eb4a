"""The documentation, built offline: nothing is fetched while it is built, and nothing when a page is viewed."""

import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Set before any example imports torch: the gallery runs in this process.
os.environ.setdefault("TQDM_DISABLE", "1")

project = "difflayers"
author = "The difflayers developers"
copyright = "2026, the difflayers developers"
release = re.search(r'^__version__ = "(.+)"$', (ROOT / "difflayers" / "__init__.py").read_text(), re.MULTILINE)[1]
version = release

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "auto_examples/**.ipynb", "auto_examples/**.py", "auto_examples/**.md5"]

html_theme = "furo"
html_title = f"difflayers {release}"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_theme_options = {"navigation_with_keys": True}
html_copy_source = False
html_show_sourcelink = False

# The page's own MathJax in place of the one on a content network.
mathjax_path = "mathjax/tex-svg.js"

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_attr_annotations = False
python_display_short_literal_types = True
python_maximum_signature_line_length = 100
toc_object_entries_show_parents = "hide"

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "auto_examples",
    "filename_pattern": r"\.py$",
    "ignore_pattern": r"__init__\.py",
    "within_subsection_order": "ExampleTitleSortKey",
    "abort_on_example_error": False,
    "run_stale_examples": True,  # an example shows what the package does, and only the package may have changed
    "download_all_examples": False,
    "write_computation_times": False,
    "show_memory": False,
    "show_signature": False,
    "plot_gallery": True,
    "remove_config_comments": True,
}
