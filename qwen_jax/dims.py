# SPDX-License-Identifier: Apache-2.0
"""The letters that end tensor names, and the names of dims that can be sharded.

Letters (the same in names and in einsum strings):

    b batch rows        t query positions    s key positions     d width (embed)
    h kv heads          g query heads per kv head                k head width
    n query heads (h*g) f mlp hidden         e experts           a experts per token
    m tokens flattened  v vocabulary         l stacked layers    c chunks
    p image patches     u value width of a linear layer   j taps of a convolution
    y classes of a score head
    r residual streams  i width of an index of keys

`dim` is of an array, `axis` is of the mesh. A `Param` names its dims with the words
below; `mesh.Rules` says on which mesh axis a word lies.
"""

BATCH = "batch"  # rows of a batch, activations only
EMBED = "embed"  # model width of a weight: gathered where the weight is used
HEADS = "heads"  # query heads (times head width where the two are joined)
KV_HEADS = "kv_heads"
FFN = "ffn"
VOCAB = "vocab"
LAYERS = "layers"
EXPERTS = "experts"

ALL = (BATCH, EMBED, HEADS, KV_HEADS, FFN, VOCAB, LAYERS, EXPERTS)
