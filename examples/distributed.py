"""Statistics over two processes: a batch of digits in unequal parts, then one long recording cut in time.

    torchrun --nproc-per-node 2 examples/distributed.py

Each process works on its part, and what they get together is compared with one process that has everything. Without
torchrun the script starts it by itself.
"""

# %%
import os
import subprocess
import sys

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from flexnorm import Norm, normalize
from flexnorm.conversion import convert_sync_batchnorm

if "RANK" not in os.environ:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    sys.exit(subprocess.run(torchrun, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode)

dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
rank, world = dist.get_rank(), dist.get_world_size()
device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")


def say(text):
    if rank == 0:
        print(text, flush=True)


# %% Digits: a model with batch norm, trained for some steps by one process, and by all under DistributedDataParallel.
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32, device=device).unsqueeze(1) / 16
classes = torch.tensor(digits.target, device=device)
BATCH, STEPS = 96, 10
shares = [BATCH // world - 10] * (world - 1)
shares.append(BATCH - sum(shares))  # of every batch: unequal on purpose


def made():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6 * 6, 10)).to(
        device
    )


def train(model, parts):
    """Losses are summed and divided by the whole batch, as DistributedDataParallel takes the mean of the gradients."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        chosen = torch.arange(step * BATCH, (step + 1) * BATCH, device=device)
        mine = chosen if parts is None else chosen.split(parts)[rank]
        loss = nn.functional.cross_entropy(model(images[mine]), classes[mine], reduction="sum") / BATCH
        optimizer.zero_grad()
        (loss * (1 if parts is None else world)).backward()
        optimizer.step()


def compare_training():
    alone, together = made(), convert_sync_batchnorm(made())
    train(alone, None)
    train(DistributedDataParallel(together), shares)
    differences = [
        float((a.double() - b.double()).abs().max())
        for a, b in zip(alone.state_dict().values(), together.state_dict().values(), strict=True)
    ]
    say(f"digits: batches of {BATCH} as {shares}, {STEPS} steps; largest difference of any weight or statistic")
    say(f"  to one process: {max(differences):.1e}")
    assert max(differences) < 1e-5 * STEPS, differences  # float32, every step on top of the last


# %% A recording too long for one: every process has a piece of its time, and all of it is one set for each band.
def compare_recording():
    torch.manual_seed(0)
    spectrogram = torch.randn(1, 40, 1000, device=device).cumsum(-1)
    pieces = spectrogram.tensor_split([300 * i for i in range(1, world)], dim=-1)
    norm = Norm("b (g f) t -> b g", affine="(g f)", g=4, sizes={"(g f)": 40}, sharded="t", device=device)
    x = pieces[rank].clone().requires_grad_()
    y = norm(x)
    y.pow(3).mean().backward()

    whole = spectrogram.clone().requires_grad_()
    expected = normalize(whole, "b (g f) t -> b g", g=4)
    sum(part.pow(3).mean() for part in expected.tensor_split([300 * i for i in range(1, world)], dim=-1)).backward()
    start = sum(piece.shape[-1] for piece in pieces[:rank])
    mine = slice(start, start + x.shape[-1])
    errors = torch.stack([(y - expected[..., mine]).abs().max(), (x.grad - whole.grad[..., mine]).abs().max()])
    dist.all_reduce(errors, op=dist.ReduceOp.MAX)
    say(f"a recording in {world} pieces: differences of results and of gradients to one process")
    say(f"  {errors[0]:.1e} and {errors[1]:.1e}")
    assert errors.max() < 1e-5


# %% All end together: gloo may abort in a process that outlives the connections of the others
compare_training()
compare_recording()
dist.barrier()
dist.destroy_process_group()
