"""The adaptive forward pass: what is decided, block by block, and what is computed for it.

The idea, to be read in this order: `decisions` are what is executed, `cost` is what they cost in MACs, `controller`
gives a logit for each block, head and token, `deciding` cuts the logits, `block` is what a decision means. The machine:
`walk` takes a batch through the blocks, `cap` limits what an image may spend, `sparse` executes what is kept, `masked`
is the reference (`block.masked_block`). A dropped token is not removed: its row stays as it was, and no other row reads
it in that block. Underneath: `attention`, `products` (of matrices), `kernels` (which compute them fastest here) and
`races` (what was fastest, kept), `processor` (which one it is), `native` and `native_loop` (deciding, compiled),
`dither` (which tokens go first), `changes` (whether weights are still the same).
"""
