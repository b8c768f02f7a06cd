"""Which ViTs can be made adaptive, and where they come from.

`backbone`: timm's ViTs: what is supported, how one is described and rebuilt. `pretrained`: by name and checkpoint file
(`checkpoint_files`, `hub`). `from_transformers`: ViT, DeiT and DINOv2 of transformers. `importance`: heads and units in
order of importance. `mlp`: the layers of timm's MLPs. `stem` and `token_avg`: parts that timm does not have.
"""
