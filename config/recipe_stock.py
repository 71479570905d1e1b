"""The recipe for models that Hugging Face's qwen3 expresses:

    python train.py config/s.py config/recipe_stock.py --ffn_dim=2048

ffn_dim: 8/3 of the width, so that SwiGLU's three matrices have the parameters of two of 4 x the width. In qwen3 the
norm of the embeddings goes into their table, qk_norm into the weights of the q and k norms.
"""
norm = "rmsnorm"
act = "swiglu"               # qwen3's FFN is gated
bias = False
tie_embeddings = False       # embeddings and head want rates that differ 40-fold
qk_norm = 1.2                # large rates would let the scores grow; 1.2 keeps attention as sharp as it likes to be
rope_theta = 100_000
embed_norm = True            # the size of an embedding then does not matter, only its direction
init = "zero"                # every block starts as the identity, whatever the depth

optimizer = "muon"           # with the parts above 0.27 nats ahead of AdamW on the paper's, 8 layers x 768
lr = "auto"                  # and all other rates: muon_rates in config/__init__.py
weight_decay = "auto"
grad_clip = 0                # an orthogonalised step has one size whatever the gradient's
schedule = "linear"
decay_ratio = 0.65           # a third at full rate, then a line
min_lr_ratio = 0             # to 0
warmup_ratio = 0
warmup_steps = 40            # Muon needs none; AdamW's second moments do
