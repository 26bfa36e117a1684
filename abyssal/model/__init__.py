"""The model as the paper describes it, one section a file; parameters carry the checkpoint's names.

Legend of the shape suffixes, the same in every file of this room and of `kernels`:

    T tokens of a packed batch    B, G sequences            S tokens of each    V vocabulary
    D hidden_size                 N residual streams (paper n_hc)
    H query heads                 C head_dim (paper c)       R rotated dimensions
    Q latent of the query (q_lora_rank); in kernels, queries  G output groups
    I index heads                 J index_head_dim           M tokens of a compressed block (paper m)
    E routed experts              K chosen experts           F expert width
"""

from abyssal.model.batch import Batch
from abyssal.model.recorder import Attended, Recorder
from abyssal.model.transformer import Output, Transformer

__all__ = ["Attended", "Batch", "Output", "Recorder", "Transformer"]
