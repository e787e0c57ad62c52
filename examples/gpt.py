"""A byte-level GPT on the Python standard library's own source: under 3 bits a byte (pairs: 3.48).

python examples/gpt.py                                # one worker, for debugging
supple plan examples/gpt.py                           # how many workers does it deserve?
supple train examples/gpt.py --workers 1:4            # train, with a number of workers that changes
"""

import math
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

import supple

CONTEXT, WIDTH, HEADS, LAYERS, NUM_WINDOWS = 64, 96, 4, 2, 16_000


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """`count` stretches of CONTEXT bytes, evenly spread over the text, each with the next bytes."""

    def __init__(self, text: bytes, count: int) -> None:
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.count, self.stride = count, (len(text) - CONTEXT - 1) // count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = index * self.stride
        window = self.text[start : start + CONTEXT + 1].long()
        return window[:-1], window[1:]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.before_attention(x)).unflatten(-1, (3, HEADS, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.before_mlp(x))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.byte, self.place = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*[Block() for _ in range(LAYERS)], nn.LayerNorm(WIDTH))
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.byte(x) + self.place.weight))


def texts() -> tuple[bytes, bytes]:
    """(to train on, held out): every tenth module is held out."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    modules = [file.read_bytes() for file in files]
    held_out = modules[::10]
    del modules[::10]
    return b"".join(modules), b"".join(held_out)


@torch.no_grad()
def bits_per_byte(model: nn.Module, windows: Windows) -> float:
    x, y = (torch.stack(side) for side in zip(*(windows[i] for i in range(256)), strict=True))
    return float(F.cross_entropy(model(x).flatten(0, 1), y.flatten())) / math.log(2)


def train(job: supple.Job) -> None:
    text, held_out = texts()
    model = job.model(GPT)
    job.optimizer(torch.optim.AdamW, lr=3e-3, schedule=lambda done: 1.0 - done)
    for x, y in job.batches(Windows(text, NUM_WINDOWS), batch_size=32):
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        job.step(loss, clip_norm=1.0)
        job.report(loss=loss)
    found = bits_per_byte(model, Windows(held_out, 256))
    if job.rank == 0:
        print(f"{found:.2f} bits per byte of text never seen, after {job.step_count} steps")
    assert found < 3.0, f"{found:.2f} bits per byte, expected less than 3"


if __name__ == "__main__":
    supple.run(train)
