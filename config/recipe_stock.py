"""The recipe for models that Hugging Face's qwen3 expresses:

    python train.py config/s.py config/recipe_stock.py --ffn_dim=2048

ffn_dim: 8/3 of the width, so that SwiGLU's three matrices have the parameters of two of 4 x the width. In qwen3 the
norm of the embeddings goes into their table, qk_norm into the weights of the q and k norms.
"""
norm = "rmsnorm"
act = "swiglu"               # qwen3's FFN is gated
bias = False
tie_embeddings = False       # embeddings and head want rates that differ 40-fold
qk_norm = 1.2                # bounds the attention scores at large rates; above 1, so that attention can be sharp
rope_theta = 100_000
embed_norm = True            # the size of an embedding then does not matter, only its direction
init = "zero"                # every block starts as the identity, whatever the depth

optimizer = "muon"           # not measured apart from the parts above (docs/experiments.md)
lr = "auto"                  # and all other rates: muon_rates in config/__init__.py
weight_decay = "auto"
grad_clip = 0                # the size of an orthogonalised step does not depend on the gradient's
schedule = "linear"
decay_ratio = 0.65           # the first third at full rate, then a linear fall
min_lr_ratio = 0             # to 0
warmup_ratio = 0
warmup_steps = 40            # Muon needs none; AdamW's second moments do
