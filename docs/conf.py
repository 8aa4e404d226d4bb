"""The site: `sphinx-build -W -c docs . site` makes it in site/, and checks every link and anchor.

The source is the whole repository, so that a link is the same on the site as in a checkout.
"""

project = "fastcifar"
extensions = ["myst_parser", "sphinxcontrib.mermaid"]
include_patterns = ["*.md", "docs/**.md", "benchmarks/*.md", "kernels/*.md"]
root_doc = "docs/index"
myst_fence_as_directive = ["mermaid"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = project
