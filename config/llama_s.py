"""s with LLaMA blocks: RMSNorm, SwiGLU, rotary positions, no biases, grouped-query attention, an untied head."""
n_layer = 12                # as s
n_embd = 768                # as s
n_head = 12                 # heads of 64
n_kv_head = 4               # three query heads share keys and values: a cache of a third
ffn_dim = 2048              # 8/3 x 768: SwiGLU's three matrices cost what the GELU FFN's two do
block_size = 1024           # as s
vocab_size = 32000          # LLaMA's, so that a dry run needs no data
norm = "rmsnorm"            # as LLaMA
act = "swiglu"              # as LLaMA
bias = False                # as LLaMA
tie_embeddings = False      # as LLaMA

dataset = "refinedweb"      # as s
tokenizer = "llama"         # as s, so that losses compare
max_tokens = 2.2e9          # as s
batch_size = 512            # as s
micro_batch_size = 64       # changes memory and speed, not the result

lr = 6e-4                   # as s
