"""The paper's xl: 1274M parameters, 25.5B tokens of RefinedWeb."""
n_layer = 24
n_embd = 2048
n_head = 16
block_size = 1024
vocab_size = 32000

dataset = "refinedweb"
tokenizer = "llama"
max_tokens = 25.5e9
batch_size = 512
micro_batch_size = 16

lr = 2e-4
