"""How the documentation is built: ``sphinx-build -W -b html docs <out>``."""

import wove_ws_sync

project = "wove_ws_sync"
author = "wove_ws_sync contributors"
copyright = "wove_ws_sync contributors"  # Sphinx wants this name
version = release = wove_ws_sync.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"wove_ws_sync {release}"

autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
