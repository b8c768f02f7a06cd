"""Which ViTs can be made adaptive, and where they come from.

`backbone`: timm's ViTs: what is supported, how one is described and rebuilt. `pretrained`: by name and checkpoint file
(`checkpoint_files`, `hub`). `from_transformers`: models of transformers (`transformers_models`: which ones;
`image_processor`: how their images are prepared). `importance`: heads and units in order of importance. `layers`: what
the layers of a block do, by family. `eva`: timm's `eva` family. `stem` and `token_avg`: parts that timm does not have.
"""
