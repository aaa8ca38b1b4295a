"""Groups that are learned: from what channels respond to, from how they correlate, or by gradients; and counts of them.

All end in a `Partition` of the channels, which `ChannelGroupNorm(..., groups=partition)` and `regroup` take. Clusters
are those of scikit-learn: `pip install "flexnorm[learn]"`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .axes import divisors
from .calls.call import Call, Used
from .calls.functional import moments, normalize
from .errors import ShapeError, SpecError, say, shown
from .images import ChannelGroupNorm, over_pixels
from .layers.norm import Norm
from .partition import Partition, readable, whole
from .places import take_place
from .statistics import Moments, each

__all__ = ["SoftGroupNorm", "cluster_channels", "correlate_channels", "groups_by_depth", "regroup", "signatures"]


# --- from data to a partition ----------------------------------------------------------------------------------------


def signatures(
    responses: Tensor | Moments, stimuli: Tensor | Partition | None = None, mask: Tensor | None = None
) -> Tensor:
    """The signature of every channel: its mean response to every stimulus.

    For each channel c and stimulus s:   signature[c, s] = mean of responses[n, c, ...] over the n with stimuli[n] = s

    Args:
        responses: of the channels of a layer, (N, C, *spatial). Or what `moments` says of them per stimulus and
            channel, (S, C), merged from batch to batch: `moments(x, "n c ... -> stimulus[n] c", stimulus=partition)`.
        stimuli: the stimulus of every sample, (N,), ids from 0 to S - 1: its class, say. None: every sample is a
            stimulus of its own.
        mask: bool (which positions there are) or floating (weights), (N, *spatial), or of size 1 along an axis.

    Returns:
        (C, S), in float32 or wider.

    Raises:
        SpecError: an argument is none of these.
        ShapeError: shapes do not fit, a stimulus has no response, or responses are not finite.

    >>> responses = torch.tensor([[[1.0, 3.0], [0.0, 0.0]], [[5.0, 5.0], [4.0, 8.0]], [[2.0, 2.0], [0.0, 2.0]]])
    >>> signatures(responses, torch.tensor([0, 1, 0]))
    tensor([[2.0000, 5.0000],
            [0.5000, 6.0000]])
    """
    if isinstance(responses, Moments):
        m = responses
        m.check()
        if stimuli is not None or mask is not None:
            rule, instead = "moments know already of which stimuli they are, and what counted", "signatures(m)"
            raise SpecError(say(rule, received="moments, and stimuli or a mask", instead=instead))
    else:
        _check_responses(responses)
        ids = torch.arange(len(responses), device=responses.device) if stimuli is None else stimuli
        mask = over_pixels(responses, mask)
        m = moments(responses, "n c ..., n ... -> stimulus[n] c", mask, stimulus=ids)
    if m.mean.dim() != 2:
        received, instead = f"moments of shape {tuple(m.mean.shape)}", 'moments(x, "n c ... -> stimulus[n] c", ...)'
        raise ShapeError(say("moments stand per stimulus and channel, (S, C)", received=received, instead=instead))
    unseen = (m.count <= 0).any(1).nonzero().flatten().tolist()
    if unseen:
        raise ShapeError(
            say(
                "every stimulus has responses",
                received=f"{m.mean.shape[0]} stimuli, and nothing of {shown(unseen)}",
                instead="ids without gaps: torch.unique(stimuli, return_inverse=True)[1]",
            )
        )
    _check_finite(m.mean.T, "responses")
    return m.mean.T.contiguous()


def cluster_channels(
    signatures: Tensor, count: int, *, balanced: bool = False, standardize: bool = True, random_state: int | None = 0
) -> Partition:
    """Groups of channels with similar signatures, by k-means.

    minimize over groups g:   sum over channels c of |signature[c] - mean of the signatures in g(c)|^2

    Args:
        signatures: (C, S), of `signatures` or any other features of channels.
        count: number of groups, at most C.
        balanced: groups of equal sizes (where count does not divide C, sizes that differ by 1). Lloyd's algorithm with
            the best assignment under this constraint, from the centres of k-means on; the assignment of C channels
            takes C^3 steps.
        standardize: compare signatures without the offset and scale of each channel: mean 0 and variance 1 over
            stimuli. Without it, loud channels are apart from quiet ones.
        random_state: of scikit-learn, for the first centres.

    Returns:
        A `Partition` of shape (C,) with `count` groups, none of them empty, in the order of their first channels.

    Raises:
        ImportError: scikit-learn is missing.
        SpecError: signatures are no real tensor, or count is no whole number of 1 or more.
        ShapeError: count is above the number of channels, or (without `balanced`) of different signatures; shapes do
            not fit; signatures are not finite.

    >>> s = torch.tensor([[0.0, 1.0, 2.0], [3.0, 2.0, 1.0], [10.0, 20.0, 30.0], [0.3, 0.2, 0.1]])
    >>> cluster_channels(s, 2).ids
    tensor([0, 1, 0, 1])

    Source: `sklearn.cluster.KMeans`; Malinen and Fränti, "Balanced K-Means for Clustering", 2014.
    """
    if not isinstance(signatures, Tensor) or signatures.is_complex() or signatures.dtype == torch.bool:
        received, instead = shown(signatures), "signatures(responses, stimuli)"
        raise SpecError(say("signatures are a tensor of real numbers", received=received, instead=instead))
    if signatures.dim() != 2 or signatures.numel() == 0:
        received, instead = f"a tensor of shape {tuple(signatures.shape)}", "signatures.flatten(1)"
        raise ShapeError(say("signatures have the axes (C, S), channels first", received=received, instead=instead))
    count = _group_count(count, len(signatures))
    _check_finite(signatures, "signatures")
    points = signatures.detach().cpu().double()
    points = normalize(points, "c s -> c", eps=0) if standardize else points
    ids, centres = _kmeans(points, count, random_state)
    partition = _numbered(_balanced(points, centres) if balanced else ids, signatures.device)
    if partition.count < count:
        one = ", all equal when standardized, as there is one stimulus" if standardize and points.shape[1] == 1 else ""
        raise ShapeError(
            say(
                "k-means finds no more groups than there are different signatures",
                received=f"count={count}, {len(points)} signatures with {partition.count} different ones{one}",
                instead=f"count={partition.count}; balanced=True, which divides equal ones",
            )
        )
    return partition


def correlate_channels(
    responses: Tensor, count: int, *, mask: Tensor | None = None, absolute: bool = True
) -> Partition:
    """Groups of channels that go together, by their correlation over samples and positions.

    Agglomerative, by the average over pairs of channels (a, b) of   1 - |r[a, b]|,   r: Pearson's correlation

    Args:
        responses: of the channels of a layer, (N, C, *spatial). They are copied, in float64.
        count: number of groups, at most C.
        mask: bool (which positions there are) or floating (weights), (N, *spatial), or of size 1 along an axis.
        absolute: a channel and its negative belong together. Without it the distance is 1 - r.

    Constant channels correlate with nothing: they are at distance 1 from all others and at 0 from each other.

    Returns:
        A `Partition` of shape (C,) with `count` groups, none of them empty, in the order of their first channels.

    Raises:
        ImportError: scikit-learn is missing.
        SpecError: responses are no real tensor, or count is no whole number of 1 or more.
        ShapeError: count is above the number of channels, shapes do not fit, responses are not finite, or there are
            fewer than two of a channel.

    >>> x = torch.tensor([[0.0, 5.0, 0.0], [1.0, 5.0, -1.0], [0.0, 9.0, 0.0], [1.0, 9.0, -1.0]])
    >>> correlate_channels(x, 2).ids
    tensor([0, 1, 0])
    >>> correlate_channels(x[:, ::2], 2, absolute=False).ids
    tensor([0, 1])

    Source: `sklearn.cluster.AgglomerativeClustering`.
    """
    _check_responses(responses)
    count = _group_count(count, responses.shape[1])
    mask = over_pixels(responses, mask)
    x, pattern = responses.detach().double(), "n c ..., n ... -> c"
    m = moments(x, pattern, mask)
    _check_finite(m.mean, "responses")
    if not bool((m.count > (0 if m.count.is_floating_point() else 1)).all()):
        received, instead = f"responses of shape {tuple(responses.shape)}, {int(m.count.min())} of a channel", "more"
        raise ShapeError(say("two responses of a channel or more correlate", received=received, instead=instead))
    z = normalize(x, pattern, mask, moments=m, eps=0)
    if mask is not None and mask.is_floating_point():  # what weighs nothing may be NaN
        z = z.where(mask.detach()[:, None] > 0, 0)
    weighted = z if mask is None else z * mask.detach().to(z.dtype)[:, None]
    z, weighted = (t.movedim(1, 0).flatten(1) for t in (z, weighted))
    r = weighted @ z.T / m.count  # 0 for constant channels, which are 0 in z
    distance = (1 - (r.abs() if absolute else r)).clamp(min=0)
    constant = m.m2 == 0
    distance[constant[:, None] & constant] = 0
    return _numbered(_agglomerated(distance.fill_diagonal_(0).cpu(), count), responses.device)


def regroup(norm: nn.GroupNorm, partition: Partition | Tensor) -> ChannelGroupNorm:
    """A group norm with these groups in place of its own.

    Args:
        norm: `nn.GroupNorm` or `ChannelGroupNorm`. It is not changed.
        partition: the group of every channel, (C,): a `Partition`, or the tensor of its ids.

    Returns:
        A `ChannelGroupNorm` with the weight and bias of `norm` (the same parameters, so that an optimizer keeps its
        own), its eps, activation, mode, hooks, dtype and device.

    Raises:
        SpecError: norm is something else, a subclass with a forward of its own included, or partition is none.
        ShapeError: the partition misses channels, or a group of it is empty.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4))
    >>> model[1] = regroup(model[1], Partition(torch.tensor([0, 1, 1, 1])))
    >>> model[1]
    ChannelGroupNorm(2, 4, eps=1e-05, affine=True, groups=Partition(4 ids, count=2))
    """
    if type(norm) not in (nn.GroupNorm, ChannelGroupNorm):
        received, instead = shown(norm), "an nn.GroupNorm; ChannelGroupNorm(..., groups=partition) in a class of yours"
        raise SpecError(
            say("groups are those of an nn.GroupNorm or ChannelGroupNorm", received=received, instead=instead)
        )
    partition = _checked(partition, norm.num_channels)
    options: dict[str, Any] = {}
    if isinstance(norm, ChannelGroupNorm):
        options = {"zero_init": norm.zero_init, "activation": norm._options.activation}
    return _with_groups(norm, partition, **options)


# --- groups that gradients move --------------------------------------------------------------------------------------


class SoftGroupNorm(Norm):
    r"""Group norm whose groups are trained: every channel belongs to every group by a share, softmax(logits).

    For each image n and channel c, with shares p = softmax(logits / temperature) over the groups:

        mean_g[n], var_g[n]: those of all elements of the image, an element of channel c weighted by p[c, g]
        mean[n, c] = sum over g of p[c, g] * mean_g[n],   var[n, c] alike
        y[n, c] = (x[n, c] - mean[n, c]) / sqrt(var[n, c] + eps) * weight[c] + bias[c]

    With shares of 0 and 1 it is the group norm of that partition. Groups overlap, so no pattern names them: the moments
    are those of `"n c ..., n ... -> n c"`, coarsened and mixed.

    Args:
        num_groups: number of groups, G. Of one group every channel is a member, whatever the logits.
        num_channels: number of channels, C.
        eps: added to the variance, in the unit of x squared.
        affine: learn weight and bias, of shape (C,).
        device, dtype: of the parameters. Of a complex dtype the logits are real.
        bias: learn a bias beside the weight.
        temperature: the logits are divided by it. An attribute: lower it while training, and shares become 0 and 1.
        groups: groups to begin with, as in `ChannelGroupNorm`. None: logits are drawn from N(0, 1), as equal ones have
            no gradient.
        activation: "relu", "silu" or "gelu", applied to the result.

    Attributes:
        logits: the trained parameter, (C, G).

    Shapes: x is (N, C, *spatial), and the mask (N, *spatial), as in `ChannelGroupNorm`.

    Raises:
        SpecError, ShapeError: an argument does not fit. Both are ValueErrors.

    >>> norm = SoftGroupNorm(2, 6)
    >>> norm(torch.randn(4, 6, 5, 5)).shape, norm.shares.shape
    (torch.Size([4, 6, 5, 5]), torch.Size([6, 2]))
    >>> isinstance(norm.hardened(), nn.GroupNorm)
    True

    Source: the softmax over candidate statistics is that of Luo et al., "Differentiable Learning-to-Normalize via
    Switchable Normalization", 2019, with groups in place of kinds of norms.
    """

    logits: nn.Parameter

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        temperature: float = 1.0,
        groups: Sequence[int] | Tensor | Partition | None = None,
        activation: str | None = None,
    ) -> None:
        num_groups, num_channels = whole(num_groups, "num_groups", 1), whole(num_channels, "num_channels", 1)
        super().__init__(
            _PER_CHANNEL,
            affine="c" if affine else None,
            c=num_channels,
            eps=eps,
            bias=bias,
            activation=activation,
            device=device,
            dtype=dtype,
        )
        self.num_groups, self.num_channels, self.affine = num_groups, num_channels, affine
        self.temperature = temperature
        self._first = None
        if groups is not None:
            self._first = ChannelGroupNorm(num_groups, num_channels, affine=False, groups=groups).labels["group"]
        real = dtype.to_real() if dtype is not None and dtype.is_complex else dtype
        self.logits = nn.Parameter(torch.empty(num_channels, num_groups, device=device, dtype=real))
        self.reset_parameters()

    @property
    def temperature(self) -> float:
        """What the logits are divided by."""
        return self._temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            received, instead = f"temperature={shown(value)}", "temperature=1.0; towards 0, shares become 0 and 1"
            raise SpecError(say("a temperature is a number above 0", received=received, instead=instead))
        self._temperature = value

    @property
    def shares(self) -> Tensor:
        """softmax(logits / temperature): by how much every channel belongs to every group, (C, G)."""
        return (self.logits / self.temperature).softmax(-1)

    def reset_parameters(self) -> None:
        """Weight 1, bias 0, and logits from N(0, 1); or those that give a share of 0.9 in the first groups."""
        super().reset_parameters()
        if "logits" not in self._parameters:  # while Norm is being built
            return
        if self._first is None:
            nn.init.normal_(self.logits)
            return
        own = self.temperature * math.log(_OWN / (1 - _OWN) * max(self.num_groups - 1, 1))
        ids = self._first.ids.to(self.logits.device)
        with torch.no_grad():
            self.logits.zero_().scatter_(1, ids[:, None], own)

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]  # torch's name
        """Normalizes x.

        Args:
            input: x, (N, C, *spatial).
            mask: bool (which pixels there are) or floating (weights), (N, *spatial), or of size 1 along an axis.
        """
        return super().forward(input, mask)

    def fit_mask(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        """The mask over all pixels. `forward` does not do it, because `given` may bring a mask."""
        return over_pixels(x, mask) if isinstance(x, Tensor) else mask

    def used(self, call: Call, own: Moments) -> Used:
        """The moments that every channel is normalized by, (N, C)."""
        p = (self.logits.to(own.m2.dtype) / self.temperature).softmax(-1)
        groups = each(lambda t: t[..., None], own).weighed(p).coarsen("n c g -> n g")
        mixed = each(lambda t: t[:, None], groups).mixed(p)
        return Used(mixed, mixed)

    def changes(self) -> str:
        """How shares change the moments."""
        return (
            "its groups overlap: shares mix the moments of this pattern before they are used, so that a positive gain "
            "and an offset of a whole sample change nothing, and those of a channel do"
        )

    def harden(self) -> Partition:
        """Every channel in the group of its largest share.

        Groups are numbered in the order of their first channels; those that nobody is in are left out.

        Raises:
            SpecError: a logit is NaN, so that no share is the largest.

        >>> norm = SoftGroupNorm(3, 4, groups=torch.tensor([2, 0, 0, 2]))
        >>> norm.harden(), norm.harden().ids
        (Partition(4 ids, count=2), tensor([0, 1, 1, 0]))
        """
        lost = self.logits.detach().isnan().any(1).nonzero().flatten().tolist()
        if lost:
            rule, instead = "a channel is in the group of its largest share", "logits from before training diverged"
            raise SpecError(say(rule, received=f"NaN in the logits of channels {shown(lost)}", instead=instead))
        return _numbered(self.logits.detach().argmax(1))

    def hardened(self) -> ChannelGroupNorm:
        """The group norm of `harden()`, with the weight and bias of this layer: the same parameters.

        >>> SoftGroupNorm(3, 4, groups=[1, 0, 3], activation="silu").hardened()
        ChannelGroupNorm(2, 4, eps=1e-05, affine=True, groups=Partition(4 ids, count=2), activation='silu')
        """
        return _with_groups(self, self.harden(), activation=self._options.activation)

    def extra_repr(self) -> str:
        """As of `nn.GroupNorm`, and the temperature."""
        said = [f"{self.num_groups}, {self.num_channels}, eps={self.eps}, affine={self.affine}"]
        said += ["bias=False"] if self.affine and self.bias is None else []
        said += [f"temperature={self.temperature}"]
        said += [f"activation={self._options.activation!r}"] if self._options.activation else []
        return ", ".join(said)


_PER_CHANNEL = "n c ..., n ... -> n c"
_OWN = 0.9  # share of a channel in its first group: near the group norm, and with a gradient


# --- counts of groups ------------------------------------------------------------------------------------------------


@overload
def groups_by_depth(
    layers: nn.Module | Mapping[str, int], first: int, last: int, *, channels_per_group: bool = False
) -> dict[str, int]: ...


@overload
def groups_by_depth(layers: Sequence[int], first: int, last: int, *, channels_per_group: bool = False) -> list[int]: ...


def groups_by_depth(
    layers: nn.Module | Mapping[str, int] | Sequence[int], first: int, last: int, *, channels_per_group: bool = False
) -> dict[str, int] | list[int]:
    """Numbers of groups that rise or fall with depth.

    Of layer i of 0 .. L-1:   groups[i] = the divisor of channels[i] nearest to first * (last / first)^(i / (L-1))

    Nearest by ratio; of two that are equally near, the smaller number of groups.

    Args:
        layers: the channels of norm layers, in order: a list, or a dict from their names. Or a model: its batch,
            instance and group norms, as they are registered.
        first, last: groups of the first and of the last layer.
        channels_per_group: first and last are channels of a group instead.

    Returns:
        A list for a list; otherwise a dict from the names of layers, as `convert(model, groups=...)` takes it.

    Raises:
        SpecError: there is no layer, or a number is no whole number of 1 or more.

    >>> groups_by_depth([64, 64, 128, 256], first=4, last=32)
    [4, 8, 16, 32]
    >>> groups_by_depth([64, 96, 100], first=16, last=4, channels_per_group=True)
    [4, 12, 25]
    >>> groups_by_depth(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), 2, 2)
    {'1': 2}
    """
    first, last = whole(first, "first", 1), whole(last, "last", 1)
    if isinstance(layers, nn.Module):
        named = {name: _channels(m) for name, m in layers.named_modules() if isinstance(m, _CHANNEL_NORMS)}
    elif isinstance(layers, Mapping):
        named = dict(layers)
    elif isinstance(layers, Sequence) and not isinstance(layers, str):
        named = {str(i): channels for i, channels in enumerate(layers)}
    else:
        rule = "layers are a model, a dict from names to channels, or a list of channels"
        raise SpecError(say(rule, received=f"layers={shown(layers)}", instead="[64, 128, 256], say"))
    if not named:
        rule, instead = "groups are counted for norm layers, one or more", "a model with nn.BatchNorm2d, say; [64, 128]"
        raise SpecError(say(rule, received=f"{type(layers).__name__} without any", instead=instead))
    sizes = [whole(channels, f"the number of channels of layer {name!r}", 1) for name, channels in named.items()]
    wanted = [first * (last / first) ** (i / max(len(sizes) - 1, 1)) for i in range(len(sizes))]
    if channels_per_group:
        wanted = [channels / size for channels, size in zip(sizes, wanted, strict=True)]
    counts = [_nearest_divisor(channels, groups) for channels, groups in zip(sizes, wanted, strict=True)]
    return dict(zip(named, counts, strict=True)) if isinstance(layers, (nn.Module, Mapping)) else counts


_CHANNEL_NORMS = (_NormBase, nn.GroupNorm, SoftGroupNorm)


def _channels(norm: nn.Module) -> Any:
    return norm.num_features if isinstance(norm, _NormBase) else norm.num_channels


def _nearest_divisor(number: int, wanted: float) -> int:
    return min(divisors(number), key=lambda d: round(abs(math.log(d / wanted)), 9))  # the first of two that tie


# --- clusters --------------------------------------------------------------------------------------------------------


def _kmeans(points: Tensor, count: int, random_state: int | None) -> tuple[Tensor, Tensor]:
    """The cluster of every point, and the centres: of the best of ten beginnings."""
    try:
        from sklearn.cluster import KMeans
        from sklearn.exceptions import ConvergenceWarning
    except ImportError as error:
        raise _without_sklearn(error) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different points than clusters: the caller sees
        found = KMeans(count, n_init=10, random_state=random_state).fit(points.numpy())
    return torch.from_numpy(found.labels_).long(), torch.from_numpy(found.cluster_centers_)


def _balanced(points: Tensor, centres: Tensor) -> Tensor:
    """The cluster of every point, where clusters differ in size by one at most: Lloyd's steps while they gain.

    Every centre has slots for points, the last of which may stay empty: then a point that is none takes it.
    """
    from scipy.optimize import linear_sum_assignment

    count = len(centres)
    least, more = divmod(len(points), count)
    slots = least + (more > 0)
    empty = torch.full((count * slots - len(points), slots, count), math.inf, dtype=points.dtype)
    empty[:, -1] = 0
    ids, total = torch.empty(0, dtype=torch.int64), math.inf
    while True:
        cost = torch.cdist(points, centres).square()
        table = torch.cat([cost.repeat(1, slots), empty.flatten(1)])
        new = torch.from_numpy(linear_sum_assignment(table.numpy())[1][: len(points)]) % count
        gained = float(cost.gather(1, new[:, None]).sum())
        if not gained < total:
            return ids
        ids, total = new, gained
        centres = moments(points, "c s -> group[c] s", group=Partition(ids, count)).mean


def _agglomerated(distance: Tensor, count: int) -> Tensor:
    """The cluster of every channel."""
    try:
        from sklearn.cluster import AgglomerativeClustering
    except ImportError as error:
        raise _without_sklearn(error) from error
    if count == len(distance):
        return torch.arange(count)
    found = AgglomerativeClustering(count, metric="precomputed", linkage="average").fit(distance.numpy())
    return torch.from_numpy(found.labels_).long()


def _without_sklearn(error: ImportError) -> ImportError:
    return ImportError(f'clusters are those of scikit-learn: pip install "flexnorm[learn]"\n  {error}')


def _numbered(ids: Tensor, device: torch.device | None = None) -> Partition:
    """Groups in the order of their first channels, without empty ones: the same for every numbering of clusters."""
    values, ids = torch.unique(ids, return_inverse=True)
    places = torch.arange(ids.numel(), device=ids.device)
    first = places.new_full((len(values),), ids.numel()).scatter_reduce(0, ids, places, "amin")
    return Partition(first.argsort().argsort()[ids].to(device or ids.device), len(values))


# --- what is received ------------------------------------------------------------------------------------------------


def _check_responses(responses: object) -> None:
    if not isinstance(responses, Tensor) or not responses.is_floating_point():
        received, instead = shown(responses), "the output of a layer; torch.from_numpy(array).float()"
        raise SpecError(say("responses are a tensor of floating numbers", received=received, instead=instead))
    if responses.dim() < 2 or responses.numel() == 0:
        received, instead = f"a tensor of shape {tuple(responses.shape)}", "responses[:, None] of one channel, say"
        raise ShapeError(say("responses have the axes (N, C, *spatial)", received=received, instead=instead))


def _check_finite(by_channel: Tensor, name: str) -> None:
    """The first axis is that of channels."""
    finite = by_channel.flatten(1).isfinite().all(1) if by_channel.dim() > 1 else by_channel.isfinite()
    if not bool(finite.all()):
        guilty = (~finite).nonzero().flatten().tolist()
        received = f"NaN or Inf in {len(guilty)} of {len(finite)} channels, the first is {guilty[0]}"
        instead = "a bool mask of the positions that there are, or torch.nan_to_num"
        raise ShapeError(say(f"{name} are finite", received=received, instead=instead))


def _group_count(count: int, channels: int) -> int:
    count = whole(count, "count", 1)
    if count > channels:
        rule, received = "every group has a channel, so there are no more groups", f"count={count}, {channels} channels"
        raise ShapeError(say(rule, received=received, instead=f"count={channels} or less"))
    return count


def _checked(partition: object, channels: int) -> Partition:
    partition = Partition(partition) if isinstance(partition, Tensor) else partition
    if not isinstance(partition, Partition):
        received, instead = f"partition={shown(partition)}", "cluster_channels(...); Partition.from_sizes([2, 6])"
        raise SpecError(
            say("groups of channels are a Partition, or a tensor of ids", received=received, instead=instead)
        )
    if tuple(partition.shape) != (channels,):
        received, instead = f"{partition!r}, {channels} channels", f"ids of shape ({channels},)"
        raise ShapeError(say("a partition says the group of every channel", received=received, instead=instead))
    if readable(partition.ids) and not bool(partition.counts.all()):
        empty = (partition.counts == 0).nonzero().flatten().tolist()
        received = f"{partition!r}, and nobody is in {shown(empty)}"
        instead = "Partition(partition.ids.unique(return_inverse=True)[1])"
        raise ShapeError(say("no group is empty", received=received, instead=instead))
    return partition


# --- what is kept ----------------------------------------------------------------------------------------------------


def _with_groups(norm: nn.GroupNorm | SoftGroupNorm, partition: Partition, **options: Any) -> ChannelGroupNorm:
    """A layer of these groups that has everything else of this one."""
    device = next((t.device for t in (*norm.parameters(), *norm.buffers())), partition.device)
    made = ChannelGroupNorm(
        partition.count, norm.num_channels, norm.eps, norm.affine, device, groups=partition, **options
    )
    made.weight, made.bias, made.training = norm.weight, norm.bias, norm.training
    take_place(norm, made)
    return made
