"""The paper's m: 335M parameters, 6.7B tokens of RefinedWeb."""
n_layer = 24                # the paper's depth at this size
n_embd = 1024               # and its width
n_head = 16                 # heads of 64
block_size = 1024           # the paper's context
vocab_size = 32000          # LLaMA's, so that a dry run needs no data

dataset = "refinedweb"      # the paper's data: filtered web text
tokenizer = "llama"         # the paper's, so that losses compare
max_tokens = 6.7e9          # 20 tokens a parameter
batch_size = 512            # 524 288 tokens a step, at every size
micro_batch_size = 32       # changes memory and speed, not the result

lr = 3e-4                   # peak; the larger the model, the lower
