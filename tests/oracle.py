"""The meaning of a pattern, in loops and float64. It shares no code with flexnorm.

    for each set S of x:   y[S] = (x[S] - mean(x[S])) / sqrt(var(x[S]) + eps) * weight + bias

Every function walks over all elements one by one, so keep tensors small. Gradients are those of torch's autograd
through the sets, one after another.
"""

import itertools
import math
import re
from collections import defaultdict

import torch


def read(side, rank=0):
    """A side of a pattern as a list of compositions, each a list of names and labels."""
    result, group = [], None
    for token in re.findall(r"\.\.\.|\w+\s*\[[^\]]*\]|\w+|[()]", side):
        if token == "(":
            group = []
        elif token == ")":
            result.append(group)
            group = None
        else:
            atoms = [f"dot{i}" for i in range(rank)] if token == "..." else [] if token == "1" else [token]
            if group is not None:
                group.extend(atoms)
            elif token == "1":
                result.append([])
            else:
                result.extend([atom] for atom in atoms)
    return result


def sizes_of(groups, shape, told):
    """The size of every axis; numbers are axes of their own."""
    known = dict(told)
    for group, size in zip(groups, shape, strict=True):
        group[:] = [f"fixed{atom}_{id(group)}_{i}" if atom.isdecimal() else atom for i, atom in enumerate(group)]
        known.update((atom, int(re.match(r"fixed(\d+)", atom)[1])) for atom in group if atom.startswith("fixed"))
        unknown = [atom for atom in group if atom not in known]
        if unknown:
            known[unknown[0]] = size // math.prod(known[atom] for atom in group if atom in known)
    return known


class Pattern:
    """The elements of a tensor of this shape, each as a dict from axis to index."""

    def __init__(self, pattern, shape, sizes=None, labels=None):
        left, self.right = pattern.split("->")
        x, *mask = left.split(",")
        self.rank = len(shape) - len(read(x)) if "..." in x else 0
        self.mask_axes = read(mask[0], self.rank) if mask else None
        groups = read(x, self.rank)
        self.sizes = sizes_of(groups, shape, sizes or {})
        self.names = [atom for group in groups for atom in group]
        self.labels = {name: getattr(ids, "ids", ids) for name, ids in (labels or {}).items()}
        self.counts = {
            name: getattr(ids, "count", None) or (int(ids.max()) + 1 if ids.numel() else 0)
            for name, ids in (labels or {}).items()
        }
        ranges = [range(self.sizes[name]) for name in self.names]
        self.elements = [dict(zip(self.names, index, strict=True)) for index in itertools.product(*ranges)]

    def value(self, atom, element):
        """The index of an axis, or the id of a label, at an element."""
        if "[" not in atom:
            return element[atom]
        name, axes = atom.rstrip("]").split("[")
        place = tuple(element[axis] for group in read(axes, self.rank) for axis in group)
        return int(self.labels[name.strip()][place])

    def size(self, atom):
        return self.counts[atom.split("[")[0].strip()] if "[" in atom else self.sizes[atom]

    def shape(self, side):
        return [math.prod(self.size(atom) for atom in group) for group in read(side, self.rank)]

    def place(self, side, element):
        """The index, in a tensor shaped as `side` says, that belongs to an element."""
        place = []
        for group in read(side, self.rank):
            index = 0
            for atom in group:
                index = index * self.size(atom) + self.value(atom, element)
            place.append(index)
        return tuple(place)

    def mask_place(self, element):
        place = []
        for group in self.mask_axes:
            index = 0
            for atom in group:
                index = index * self.sizes[atom] + element[atom]
            place.append(index)
        return tuple(place)

    def sets(self):
        """From a place in the tensor of statistics to the numbers of its elements."""
        sets = defaultdict(list)
        for number, element in enumerate(self.elements):
            sets[self.place(self.right, element)].append(number)
        return sets


def normalize(
    x,
    pattern,
    mask=None,
    *,
    sizes=None,
    labels=None,
    weight=None,
    bias=None,
    affine=None,
    center=True,
    scale=True,
    eps=1e-5,
    activation=None,
):
    """y in float64, differentiable in x, a float mask, weight and bias."""
    p = Pattern(pattern, x.shape, sizes, labels)
    flat = x.double().flatten()
    result = [torch.zeros((), dtype=torch.float64)] * len(p.elements)
    for members in p.sets().values():
        if mask is not None and mask.dtype == torch.bool:
            members = [i for i in members if mask[p.mask_place(p.elements[i])]]
            weights = torch.ones(len(members), dtype=torch.float64)
        elif mask is not None:
            weights = torch.stack([mask[p.mask_place(p.elements[i])].double() for i in members])
        else:
            weights = torch.ones(len(members), dtype=torch.float64)
        if not members:
            continue
        values = flat[members]
        total = weights.sum()
        if total == 0:
            normal = values * 0.0
        else:
            mean = (weights * values).sum() / total if center else 0.0
            v = (weights * (values - mean) ** 2).sum() / total + eps
            sigma = v.sqrt() if scale else torch.ones((), dtype=torch.float64)
            normal = (values - mean) / sigma if sigma != 0 else values * 0.0
        for i, y in zip(members, normal, strict=True):
            place = p.place(affine, p.elements[i]) if affine is not None else None
            y = y * weight[place].double() if weight is not None else y
            y = y + bias[place].double() if bias is not None else y
            result[i] = getattr(torch.nn.functional, activation)(y) if activation else y
    y = torch.stack(result) if result else flat
    return y.reshape(x.shape)


def moments(x, pattern, mask=None, *, sizes=None, labels=None):
    """Count, mean and M2 in float64, shaped as the right side says."""
    p = Pattern(pattern, x.shape, sizes, labels)
    flat = x.double().flatten()
    count, mean, m2 = (torch.zeros(p.shape(p.right), dtype=torch.float64) for _ in range(3))
    for place, members in p.sets().items():
        weights = torch.ones(len(members), dtype=torch.float64)
        if mask is not None:
            weights = torch.stack([mask[p.mask_place(p.elements[i])].double() for i in members])
        values = flat[members][weights > 0]
        weights = weights[weights > 0]
        count[place] = weights.sum()
        if len(values):
            mean[place] = (weights * values).sum() / weights.sum()
            m2[place] = (weights * (values - mean[place]) ** 2).sum()
    return count, mean, m2
