"""The decode kernels on the card: right? how fast, with and without? usage: kernel.py OUT [--small]"""
import json, os, statistics, sys, time
T0 = time.time()
OUT, SMALL = sys.argv[1], "--small" in sys.argv
LIMIT = float(os.environ.get("LIMIT", 115))
os.makedirs(OUT, exist_ok=True)
def say(*a):
    line = f"[{time.time()-T0:6.1f}] " + " ".join(map(str, a)); print(line, flush=True)
    with open(f"{OUT}/kernel.txt", "a") as f: f.write(line + "\n")
import jax, jax.numpy as jnp, numpy as np
from eso_jax.decoding import categorical, inversion, loop, passes
from eso_jax.decoding.categorical import Rule
from eso_jax.evaluation import throughput as tp
from eso_jax.model import attention, few, masks, plain, rotary, triton
from eso_jax.model.masks import View
from eso_jax import families, sharding
GPU = jax.default_backend() == "gpu"
INTERPRET = not GPU
say(jax.__version__, jax.devices(), getattr(jax.devices()[0], "device_kind", None))
MODE = "kernel"  # what the next programs are made with
def tried(name, f):
    try: return f()
    except Exception as e: say(name, "FAILED", repr(e)[:700]); return None
def clock(f, *a, n=30):
    jax.block_until_ready(f(*a)); t = time.perf_counter()
    for _ in range(n if GPU else 1): r = f(*a)
    jax.block_until_ready(r); return 1e6 * (time.perf_counter() - t) / (n if GPU else 1)

def attention_right(batch, slots, length, dtype, pattern, offset, rows):
    H, K = (2, 16) if SMALL else (12, 64)
    qkv = jax.random.normal(jax.random.key(0), (batch, slots, 3, H, K)).astype(dtype)
    old = jax.random.normal(jax.random.key(1), (2, batch, length, H, K)).astype(dtype)
    table = rotary.rotary_table(jax.random.randint(jax.random.key(2), (batch, slots), 0, length), K)
    def run(backend, dtype):
        axes = backend.key_axes, backend.value_axes
        kept = [plain.arrange(x.astype(dtype), a) for x, a in zip(old, axes)]
        f = jax.jit(lambda qkv, k, v: backend.extend(qkv, table, k, v, View(pattern, **rows), offset))
        out, *kept = f(qkv.astype(dtype), *kept)
        return [np.asarray(out, np.float32), *(np.asarray(x.transpose([a.index(i) for i in "BLHK"]), np.float32) for x, a in zip(kept, axes))]
    right = run(plain.Plain(), jnp.float32)
    err = lambda x: " ".join(f"{np.abs(a - b).max():.1e}" for a, b in zip(x, right))
    return f"kernel {err(run(triton.Triton(interpret=INTERPRET), dtype))}; plain {err(run(plain.Plain(), dtype))} (largest error of out, keys, values against plain float32)"
L = 64 if SMALL else 1024
for dtype in (jnp.float32, jnp.bfloat16):
    for name, args in {"causal, row offsets": (4, 2, masks.CAUSAL, jnp.array([0, L // 3, L // 2 + 1, L - 2]), {}),
                       "one row, end": (1, 2, masks.CAUSAL, jnp.int32(L - 2), {}),
                       "prefix": (4, 3, masks.PREFIX, jnp.array([9, 8, L // 2, L - 3]), {"clean": jnp.array([0, 8, 11, L // 2])}),
                       "blocks of 16": (4, 16, masks.Pattern(16), jnp.int32(L // 2), {})}.items():
        if time.time() - T0 < 40: say(f"attention {jnp.dtype(dtype).name} {name}:", tried(name, lambda: attention_right(args[0], args[1], L, dtype, *args[2:])))

def product_right():
    D, N, R = (64, 96, 3) if SMALL else (768, 3072, 2)
    x, w, b = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(R, D), (D, N), (N,)])); w = w / D**.5
    for dtype in (jnp.float32, jnp.bfloat16):
        ours = jax.jit(lambda x, w: few.product(x, w, None, b, True, interpret=INTERPRET))(x, w.astype(dtype))
        right = jax.nn.gelu(np.asarray(x, np.float64) @ np.asarray(w, np.float64) + np.asarray(b)[None], approximate=True)
        say("product", jnp.dtype(dtype).name, "largest error", float(np.abs(np.asarray(ours, np.float32) - right).max()))
tried("product", product_right)
def draw_right():
    R, V = (16, 300) if SMALL else (256, 50258)
    logits = jax.random.normal(jax.random.key(0), (R, V)) * jnp.linspace(.1, 8, R)[:, None]; u = jax.random.uniform(jax.random.key(1), (R, 2))
    fits = inversion.fits; inversion.fits = lambda: False
    try:
        for rule in (Rule(), Rule(.8, .9), Rule(1., .7, .02)):
            ref = jax.jit(lambda l, u: categorical.draw(l, u, rule)); ours = jax.jit(lambda l, u: inversion.choose(l, u, rule.temperature, rule.top_p, rule.min_p, interpret=INTERPRET))
            a, b = np.asarray(ref(logits, u)), np.asarray(ours(logits, u))
            say("draw", rule.temperature, rule.top_p, rule.min_p, f"other tokens {(a != b).sum()} of {R}; us: kernel {clock(ours, logits, u):.0f}, XLA {clock(ref, logits, u):.0f}; one row: {clock(ours, logits[:1], u[:1]):.0f}, {clock(ref, logits[:1], u[:1]):.0f}")
    finally: inversion.fits = fits
tried("draw", draw_right)

kept = {}
def case_of(name): return next(c for c in tp.PRESETS["table11"].cases if c.label == name)
def engine(name, length, wanted):
    preset = tp.PRESETS["table11"]
    extra = ("model.width=32", "model.heads=2", "model.layers=1", "model.vocab_size=500") if SMALL else ()
    config = tp._config(preset, length, case_of(name), extra)
    if "w" not in kept: kept["w"] = tp.random_weights(config.model, jnp.dtype(preset.dtype)); kept["machine"] = tp.measure_machine(jnp.dtype(preset.dtype)); say(kept["machine"])
    return tp._engine(kept["w"].replace(attention=wanted), config, 1), preset
RUNS = 3
def measure(name, batch, length, rows, part=0.5):
    """ms a pass, of the run of passes in the middle of the plan and of the last, by each of the ways; alternately."""
    ways, clocks = {}, {}
    for way in WAYS:
        def make():
            jax.clear_caches(); SET[way]()
            eng, preset = engine(name, length, "plain" if way == "plain" else "auto")
            config, weights = eng.config, eng.weights
            family = families.get(config); sampler = family.sampler(config)
            plan = family.plan(jax.random.key(0), config, batch, 1, 1.0, case_of(name).policy)
            with jax.set_mesh(eng.mesh):
                source = loop.Draw(loop.draw_uniforms(tp._keys(plan), plan.length), preset.rule)
                runs = passes.schedule(plan, sampler, row=passes.row_cost(config.model))
                at = len(runs) // 2 if part == 0.5 else len(runs) - 1
                run = runs[at]
                state = [loop.grow(loop.start(weights, config.model, sampler, plan), run.shape)]
                t = time.time()
                def go():
                    with jax.set_mesh(eng.mesh):
                        state[0] = loop.decode_run(weights, state[0], run.steps, source, config.model, sampler, run.shape); jax.block_until_ready(state)
                go()
            floor = float(tp.step_floors(plan, sampler, config.model, weights, kept["machine"])[int(np.ravel(run.steps.first).mean())])
            return go, len(run.steps.count), time.time() - t, state[0].cache.backend.name, floor
        ways[way] = tried(f"{name} {batch} {length} {way}", make)
    for way, made in ways.items():
        clocks[way] = []
    for _ in range(RUNS):
        for way, made in ways.items():
            if made is None: continue
            t = time.perf_counter(); made[0](); clocks[way].append(1e3 * (time.perf_counter() - t) / made[1])
    for way, made in ways.items():
        if made is None: continue
        row = {"sampler": name, "batch": batch, "length": length, "where": part, "way": way, "backend": made[3], "passes": made[1], "compile_s": round(made[2], 1),
               "ms_per_pass": min(clocks[way]), "all": clocks[way], "floor_ms": 1e3 * made[4], "of_the_floor": 1e3 * made[4] / min(clocks[way])}
        say(json.dumps(row)); rows.append(row)
        with open(f"{OUT}/kernel.jsonl", "a") as f: f.write(json.dumps(row) + "\n")
    jax.clear_caches()
FITS = few.fits, inversion.fits
def set_all(): few.fits, inversion.fits = FITS
def set_attention(): few.fits, inversion.fits = (lambda *a: False), (lambda: False)
def set_plain(): set_attention()
def set_no_draw(): few.fits, inversion.fits = FITS[0], (lambda: False)
SET = {"all": set_all, "attention alone": set_attention, "no draw": set_no_draw, "plain": set_plain}
rows = []
jobs = [("Eso-LM", 1, 8192, ["all", "attention alone", "plain"]), ("Eso-LM", 1, 1024, ["all", "plain"]), ("AR", 1, 8192, ["all", "plain"]), ("Eso-LM", 16, 1024, ["all", "attention alone", "plain"]),
        ("AR", 1, 1024, ["all", "plain"]), ("AR", 16, 1024, ["all", "plain"]), ("Eso-LM", 16, 8192, ["attention alone", "plain"]), ("AR", 16, 8192, ["all", "plain"])]
for name, batch, length, WAYS in jobs:
    if time.time() - T0 > LIMIT - 15: say("no time for", name, batch, length); continue
    tried(f"{name} {batch} {length}", lambda: measure(name, batch, min(length, 128 if SMALL else length), rows, "last"))
# what the sizes of the kernels are worth, at batch 1, L = 8192
def sizes():
    global WAYS
    WAYS = ["all"]
    old = triton.TILE, triton.PROGRAMS, few.COLUMNS, few.CHUNK, triton.WARPS, few.WARPS
    for tile, programs, columns, chunk, warps, few_warps in ((128, 264, 32, 256, 4, 4), (64, 528, 32, 256, 4, 4), (64, 132, 32, 256, 4, 4), (64, 264, 16, 256, 4, 4), (64, 264, 64, 256, 4, 4), (64, 264, 32, 128, 4, 4), (64, 264, 32, 256, 4, 8), (64, 264, 32, 256, 8, 4)):
        if time.time() - T0 > LIMIT - 6: break
        triton.TILE, triton.PROGRAMS, few.COLUMNS, few.CHUNK, triton.WARPS, few.WARPS = tile, programs, columns, chunk, warps, few_warps
        say("tile, programs, columns, chunk, warps, warps of few:", tile, programs, columns, chunk, warps, few_warps)
        tried("sizes", lambda: measure("Eso-LM", 1, 128 if SMALL else 8192, rows, "last"))
    triton.TILE, triton.PROGRAMS, few.COLUMNS, few.CHUNK, triton.WARPS, few.WARPS = old
tried("sizes", sizes)
say("done")
