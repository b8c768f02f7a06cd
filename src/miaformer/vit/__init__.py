"""Which ViTs can be made adaptive, and where they come from.

`backbone`: timm's ViTs: what is supported, how one is described and rebuilt. `pretrained`: by name and checkpoint file.
`from_transformers`: ViT, DeiT and DINOv2 of transformers. `importance`: heads and units in order of importance.
`stem` and `token_avg`: parts that timm does not have.
"""
