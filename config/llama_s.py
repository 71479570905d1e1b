"""s with LLaMA blocks: RMSNorm, SwiGLU, rotary positions, no biases, grouped-query attention, an untied head."""
n_layer = 12
n_embd = 768
n_head = 12
n_kv_head = 4
ffn_dim = 2048
block_size = 1024
vocab_size = 32000
norm = "rmsnorm"
act = "swiglu"
bias = False
tie_embeddings = False

dataset = "refinedweb"
tokenizer = "llama"
max_tokens = 2.2e9
batch_size = 512
micro_batch_size = 64

lr = 6e-4
