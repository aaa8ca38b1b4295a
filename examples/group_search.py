"""Handwritten digits: Optuna searches the group counts of three norms, and whether what it finds is more than luck."""

# %%
import warnings
from itertools import pairwise
from statistics import mean, stdev

import optuna
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from flexnorm.grouping import groups_by_depth
from flexnorm.images import ChannelGroupNorm, default_groups

torch.set_num_threads(1)  # the layers are small
optuna.logging.set_verbosity(optuna.logging.WARNING)
warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
WIDTHS = (32, 64, 64)
TRIALS, EPOCHS, SEEDS = 25, 4, 5

# %% Data: 1797 real digits. Models learn from 400, the search looks at 400 others, and the rest is seen at the end
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16  # (N, 1, 8, 8)
labels = torch.tensor(digits.target)
learned, searched, unseen = torch.arange(len(images)).split([400, 400, len(images) - 800])


# %% The model, by the group counts of its norms
def cnn(groups):
    layers = [
        layer
        for (a, b), stride, g in zip(pairwise((1, *WIDTHS)), (1, 2, 2), groups, strict=True)
        for layer in (nn.Conv2d(a, b, 3, stride, 1, bias=False), ChannelGroupNorm(g, b, activation="relu"))
    ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTHS[-1], 10))


def trained(groups, seed):
    """The model after each epoch."""
    torch.manual_seed(seed)
    model = cnn(groups)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    for _ in range(EPOCHS):
        for batch in learned[torch.randperm(len(learned))].split(16):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
        yield model


@torch.no_grad()
def accuracy(model, part):
    return float((model(images[part]).argmax(1) == labels[part]).float().mean())


# %% The search. Trials that fall behind the others after an epoch are given up
def divisors(channels):
    return [d for d in range(1, channels + 1) if channels % d == 0]


def objective(trial):
    groups = [trial.suggest_categorical(f"groups {i}", divisors(width)) for i, width in enumerate(WIDTHS)]
    for epoch, model in enumerate(trained(groups, seed=trial.number)):
        trial.report(accuracy(model, searched), epoch)
        if trial.should_prune():
            raise optuna.TrialPruned
    return accuracy(model, searched)


def progress(study, trial):
    counts = ", ".join(f"{g:2}" for g in trial.params.values())
    pruned = trial.state == optuna.trial.TrialState.PRUNED
    shown = f"given up after epoch {trial.last_step + 1}" if pruned else f"{trial.value:.1%}"
    print(f"  trial {trial.number + 1:2} of {TRIALS}: groups {counts}  {shown:<22}  best so far {study.best_value:.1%}")


study = optuna.create_study(
    direction="maximize",
    sampler=optuna.samplers.TPESampler(seed=0, multivariate=True),
    pruner=optuna.pruners.MedianPruner(n_startup_trials=5),
)
study.enqueue_trial({f"groups {i}": default_groups(width) for i, width in enumerate(WIDTHS)})
print(f"{TRIALS} trials of {EPOCHS} epochs\n")
study.optimize(objective, n_trials=TRIALS, callbacks=[progress])

# %% What it found against what needs no search, each trained anew, on digits that nobody has looked at
candidates = {
    "search": list(study.best_params.values()),
    "default_groups": [default_groups(width) for width in WIDTHS],
    "groups_by_depth 2..16": groups_by_depth(WIDTHS, first=2, last=16),
    "layer norm": [1] * len(WIDTHS),
    "instance norm": list(WIDTHS),
}
print(f"\nAccuracy on {len(unseen)} digits, mean and deviation of {SEEDS} trainings\n")
for name, groups in candidates.items():
    found = [accuracy(list(trained(groups, seed=1000 + seed))[-1], unseen) for seed in range(SEEDS)]
    print(f"  {name:<22}{groups!s:<14}{mean(found):>7.1%} +- {stdev(found):.1%}")
print("\nA difference below the deviation is none: then the search has found good numbers, and others are as good.")
