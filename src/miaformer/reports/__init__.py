"""Self-contained HTML pages: no network, no other file, no script; light or dark as the reader's system is.

`page`: tags that escape what they are given, and the skeleton with its style (`page.css`). `explained`: what a picture
was given, and an index of pictures. `chart`: curves as inline SVG. `training`, `comparison`, `evaluation`: reports.
"""
