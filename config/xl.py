"""The paper's xl: 1274M parameters, 25.5B tokens of RefinedWeb."""
n_layer = 24                # the paper's depth at this size
n_embd = 2048               # and its width
n_head = 16                 # heads of 128
block_size = 1024           # the paper's context
vocab_size = 32000          # LLaMA's, so that a dry run needs no data

dataset = "refinedweb"      # the paper's data: filtered web text
tokenizer = "llama"         # the paper's, so that losses compare
max_tokens = 25.5e9         # 20 tokens a parameter
batch_size = 512            # 524 288 tokens a step, at every size
micro_batch_size = 16       # changes memory and speed, not the result

lr = 2e-4                   # peak; the larger the model, the lower
