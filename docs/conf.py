"""Settings of Sphinx: `sphinx-build -W -n docs docs/_build`."""

import importlib.metadata

project = "jax_gdn"
author = "The jax_gdn authors"
copyright = "The jax_gdn authors"
release = importlib.metadata.version("jax-gdn")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"jax_gdn {release}"
myst_heading_anchors = 3
autodoc_typehints = "none"
nitpick_ignore = [("py:exc", "checkify.JaxRuntimeError")]
# Where it is, versions of JAX differ.
nitpick_ignore_regex = [("py:class", r"jax\..*Array")]
autodoc_default_options = {"member-order": "bysource"}
