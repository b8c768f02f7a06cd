"""The adaptive forward pass: what is decided, block by block, and what is computed for it.

The idea, to be read in this order: `controller` decides, `block` says what a decision means, `cost` what it costs in
MACs, `decisions` are the types. The machine: `walk` takes a batch through the blocks, `cap` limits what an image may
spend, `sparse` executes what is kept, `masked` is the reference. Underneath: `attention`, `products` (the processor's
kernels), `deciding` and `native` (controllers at inference), `dither` (which tokens go first).
"""
