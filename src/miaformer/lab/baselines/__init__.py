"""What else adapts a ViT to a budget, on our engine or beside it, so that one harness trains and measures them all.

`policies`: the best tokens by trained scorers (DynamicViT). `exits`: leaving when confident. `merging`: token merging
(ToMe). EViT's class-token attention is `ClsAttention` in `miaformer.model.policy`, smaller images are
`miaformer.model.resolution`.
`miaformer.lab.comparison.methods` says how each is trained and asked for a budget.
"""
