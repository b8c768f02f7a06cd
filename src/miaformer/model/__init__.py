"""The adaptive model: `model.MIAFormer` and `adapt`, its settings (`config`), and what it spends.

`requests`: from what a call asks for to what is executed; `running` executes it, in one look or two. `policy`: what
makes decisions. `budget`, `looks`, `resolution`: how a mean budget is spent. `output`: logits and trace. `saved`,
`loading`: files and names. `classes`: what it answers in. `bundled`: the model that comes with the package.
"""
