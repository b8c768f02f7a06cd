"""Pages and plots: how results look.

Plots are matplotlib's: `plots`, `comparison_plot`, `speed_plot`, `robustness_plot`, `explanation_plot`, in the colours
of `style`, which also puts them into pages. Pages are self-contained HTML: no network, no other file, no script; light
or dark as the reader's system is. `page`: tags that escape what they are given, and the skeleton with its style
(`page.css`). `explaining`: what a picture was given, and an index of pictures. `report` makes a page of a run, a
comparison or an evaluation, whose parts `training`, `comparison` and `evaluation` draw from what `history` and
`measured` read.
"""
