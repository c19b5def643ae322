"""How the documentation is built: `python -m sphinx -W --keep-going -b html docs build/docs` (extra `docs`)."""

from __future__ import annotations

import sys
from pathlib import Path

# The package beside these pages is the one described, and docstrings.py is one of ours.
sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import persistency  # noqa: E402  # it is found by the line above

project = "persistency"
author = "persistency contributors"
project_copyright = "persistency contributors"
version = release = persistency.__version__

extensions = ["sphinx.ext.autodoc", "myst_parser", "sphinx_copybutton", "docstrings"]
exclude_patterns = ["build"]
nitpicky = True
# Types of the libraries that are left out below: their documentation is elsewhere, and some have lost their module.
nitpick_ignore_regex = [
    (
        "py:class",
        r"(prometheus_client|opentelemetry|key_value|starlette|langgraph|langchain_core)\..*|CollectorRegistry|MeterProvider",
    ),
    ("py:class", "RunnableConfig|CheckpointTuple"),
]
# An option's text isn't prose: `--json` is no dash, and a quotation mark is the one to be typed.
smartquotes = False

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

# The extra `docs` doesn't bring the libraries of the integrations. They are left out where they are installed, too: so
# the build is the same everywhere, and what it is warned of here it is warned of there.
autodoc_mock_imports = ["prometheus_client", "opentelemetry", "key_value", "starlette"]
autodoc_mock_imports += ["django", "asgiref", "langgraph", "langchain_core", "lmdb", "wasmtime"]
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = False
autodoc_type_aliases = {
    "ChangeKind": "persistency.storage.verbs.ChangeKind",
    "Durability": "persistency.storage.port.Durability",
    "KeyLike": "persistency.ops.KeyLike",
    "OnError": "persistency.options.OnError",
    "OnFull": "persistency.actor.bounds.OnFull",
    "Op": "persistency.Op",
    "Payload": "persistency.ops.Payload",
    "Progress": "persistency.actor.errand.Progress",
    "State": "persistency.actor.tally.State",
    "Ttl": "persistency.ops.Ttl",
    "Kind": "persistency.shared.places.Kind",
    "Group": "persistency.storage.verbs.Group",
}
# A signature that doesn't fit into a line has a line for each argument; counted are the full names of its types.
python_maximum_signature_line_length = 115
python_use_unqualified_type_names = True
add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = f"persistency {release}"
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {"navigation_with_keys": True}
copybutton_exclude = ".linenos, .gp, .go"
