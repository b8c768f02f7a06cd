"""The adaptive model: `model.MIAFormer` and `adapt`, its settings (`config`), and what it spends.

`policy`: what makes decisions. `budget`, `prices`, `looks`, `resolution`: how a mean budget becomes decisions.
`output`: logits and trace. `saved`, `loading`: files and names. `classes`: what it answers in. `bundled`: the model
that comes with the package.
"""
