import sys, time, torch, config
sys.path.insert(0, ".")
import kernels_decode as kd, bench
from decode import *
from sample import Settings as S
cfg, = config.load(["config/xl.py", "ffn=lowrank", "rank=512"])
dev = torch.device("cuda")
model = ready(bench.random_model(cfg, dev), "structured", torch.bfloat16)
def run(label, B=1, n=256):
    t0 = time.time()
    d = Decoder(model, S(temperature=0.0, max_new_tokens=n), B, n + 1)
    bs = type("x", (), dict(prompt_tokens=1, new_tokens=n))
    bench.generation(d, cfg, B, bs); t1 = time.time()
    r = sorted(bench.generation(d, cfg, B, bs)[1] * 1e3 for _ in range(3))
    print(label, "B", B, "ms/token", [round(x, 4) for x in r], f"first run {t1-t0:.1f} s", flush=True)
    return d
pdl = kd.PDL
for p in ([True, False] if pdl else [False]):
    kd.PDL = p
    try:
        d = run(f"pdl={p}")
        run(f"pdl={p}", 4)
    except Exception as e:
        print("FAILED", p, repr(e)[:500], flush=True)
from torch.profiler import profile, ProfilerActivity
def prof(d, title):
    d.prefill([Row([5])]); d.advance(128)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as p:
        for i in range(5): d.advance(129 + i)
        torch.cuda.synchronize()
    print(title)
    for e in sorted(p.key_averages(), key=lambda e: -e.device_time_total)[:16]:
        print(f"{e.key[:70]:70s} n {e.count/5:6.1f} us each {e.device_time_total/e.count:7.2f} us/step {e.device_time_total/5:8.1f}")
prof(d, "no pdl")
kd.MAX_TOKENS = 0
d = run("cublas"); prof(d, "cublas")
run("cublas", 4)
