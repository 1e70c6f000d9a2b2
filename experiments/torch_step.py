"""A compiled PyTorch training step of the sizes of `small`'s AR, to compare `eso-jax bench training` with.

Command:   python experiments/torch_step.py --batch 64 --out torch.json        (needs torch, which the package does not)

12 layers, 768 wide, 12 heads, L = 1024, V = 50,258; rotary positions, layer norms without a bias, GELU (tanh), dropout,
biases in the MLP and the head alone, untied head; float32 parameters, bfloat16 autocast, fused AdamW, clipping, a
moving average of the parameters, F.scaled_dot_product_attention. FLOPs are those that eso_jax/flops.py counts of AR's
step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from eso_jax import Config, FamilyConfig, ModelConfig, TrainConfig
from eso_jax.chips import CHIPS
from eso_jax.files import as_json, check_out, write_whole
from eso_jax.flops import training_step
from eso_jax.run.timing import wait_for

PEAK = CHIPS["h100"].flops  # an H200's too
DROPOUT = 1 / 10


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.mlp_in, self.mlp_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Any, cos: Any, sin: Any) -> Any:
        rows, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(rows, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(turn(q, cos, sin), turn(k, cos, sin), v, is_causal=True)
        out = self.out(heads.transpose(1, 2).reshape(rows, length, width))
        x = x + F.dropout(out, DROPOUT, self.training).float()
        hidden = F.gelu(self.mlp_in(self.norm2(x)), approximate="tanh")
        return x + F.dropout(self.mlp_out(hidden), DROPOUT, self.training).float()


def turn(x: Any, cos: Any, sin: Any) -> Any:
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class Model(nn.Module):
    def __init__(self, layers: int, width: int, heads: int, length: int, vocab: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width, bias=False), nn.Linear(width, vocab)
        size = width // heads
        angles = torch.arange(length)[:, None] * 10_000 ** -(torch.arange(0, size, 2) / size)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, inputs: Any, targets: Any) -> Any:
        x = self.embedding(inputs)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), targets.flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"batch": 64, "steps": 20, "layers": 12, "width": 768, "heads": 12, "length": 1024, "vocab": 50258}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value, help="%(default)s")
    parser.add_argument("--wait-for", type=Path, metavar="FILE", help="after a step, until there is such a file")
    parser.add_argument("--out", type=Path, required=True, help=".json")
    a = parser.parse_args()
    check_out(a.out)
    config = Config(ModelConfig(a.length, a.vocab, width=a.width, layers=a.layers, heads=a.heads, cond_dim=0),
                    FamilyConfig(name="ar"), train=TrainConfig(batch_size=a.batch))
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    model = Model(a.layers, a.width, a.heads, a.length, a.vocab).to(device)
    average = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, weight_decay=0, fused=True)
    compiled = torch.compile(model)
    tokens = torch.randint(a.vocab, (a.batch, a.length + 1), device=device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> Any:
        with torch.autocast(device, torch.bfloat16):
            loss = compiled(inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(average, [p.detach() for p in model.parameters()], 1e-4)
        return loss

    begun = time.perf_counter()
    first = step().item()
    compile_seconds, rounds = time.perf_counter() - begun, list[float]()
    if cuda:
        torch.cuda.empty_cache()  # others need it meanwhile
    wait_for(a.wait_for)
    for _ in range(4):  # each waits only at its end; the first is not counted
        begun = time.perf_counter()
        for _ in range(a.steps):
            loss = step()
        last = loss.item()
        rounds.append((time.perf_counter() - begun) / a.steps)
    seconds, count = statistics.median(rounds[1:]), a.batch * a.length
    flops = sum(training_step(config, shards=1).values())
    found = {"device": torch.cuda.get_device_name() if cuda else "cpu", "torch": torch.__version__, "batch": a.batch,
             "step_seconds": seconds, "rounds": rounds[1:], "tokens_per_s": count / seconds, "model_flops": flops,
             "mfu": flops / seconds / PEAK if cuda else None, "compile_seconds": compile_seconds,
             "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None, "losses": [first, last]}
    write_whole(a.out, as_json(found))
    print(as_json(found))


if __name__ == "__main__":
    main()
