"""The errors, with their full texts: the rule, the caret, what was received, what to type instead."""

import pickle
import textwrap

import pytest
import torch

from flexnorm import Moments, Norm, Partition, ShapeError, SpecError, normalize
from flexnorm.errors import draw

x = torch.zeros(4, 32, 8)
ids = torch.arange(32)

PATTERNS = [
    ("n c", """
        a pattern has one "->": the axes of x, then the axes of the statistics
            n c
               ^
          received: 0 arrows
          instead:  "n (g c) ... -> n g"
    """),
    ("n -> c -> n", """
        a pattern has one "->": the axes of x, then the axes of the statistics
            n -> c -> n
              ^^   ^^
          received: 2 arrows
          instead:  "n (g c) ... -> n g"
    """),
    ("n, c, t -> n", """
        a comma stands between the axes of x and those of the mask, once, left of the arrow
            n, c, t -> n
             ^  ^
          instead:  "b t (g c), b t -> b g"; axes are separated by blanks
    """),
    ("n c, -> n", """
        a comma says that a mask follows, but no axis does
            n c, -> n
               ^
          instead:  name the axes of the mask, or remove the comma
    """),
    ("n c -> n d", """
        the right side names the axis 'd', which x does not have
            n c -> n d
                     ^
          received: the axes of x: n, c
          instead:  name it on the left too, or one of these
    """),
    ("n channel -> n chanel", """
        the right side names the axis 'chanel', which x does not have
            n channel -> n chanel
                           ^^^^^^
          received: the axes of x: n, channel
          instead:  'channel'
    """),
    ("b t c, b s -> b", """
        the mask names the axis 's', which x does not have
            b t c, b s -> b
                     ^
          received: the axes of x: b, t, c
          instead:  name it on the left too, or one of these
    """),
    ("n c -> ...", """
        the right side has an ellipsis and x has none
            n c -> ...
                   ^^^
          instead:  "..." on the left too, or the names of the axes
    """),
    ("n ((g c) t) -> n", """
        a composition holds axes, no other composition
            n ((g c) t) -> n
              ^^
          instead:  open the inner parentheses: (a b c)
    """),
    ("n (g c -> n", """
        this ( is never closed
            n (g c -> n
              ^
          instead:  add the ) after the last axis of it
    """),
    ("n g c) -> n", """
        this ) closes nothing
            n g c) -> n
                 ^
          instead:  remove it, or add the ( before it
    """),
    ("n c -> kind[c", """
        this [ is never closed
            n c -> kind[c
                       ^
          instead:  kind[axes of the label]
    """),
    ("n c -> [c]", """
        a [ follows the name of a label
            n c -> [c]
                   ^
          instead:  label[axis], as in graph[v]
    """),
    ("n c -> kind[]", """
        label 'kind' is read at no axis
            n c -> kind[]
                   ^^^^^^
          instead:  kind[v], with the axes of the label tensor in the brackets
    """),
    ("n c -> kind[3]", """
        the brackets of label 'kind' hold names of axes of x
            n c -> kind[3]
                        ^
          instead:  kind[v], or kind[n h w] for a label of several axes
    """),
    ("n c -> c[n]", """
        'c' is an axis of x, so it cannot be a label too
            n c -> c[n]
                   ^^^^
          instead:  c_id[n]
    """),
    ("kind[n] c -> c", """
        a label names sets: it stands right of the arrow, or in affine=; on the left stand the axes it is read at
            kind[n] c -> c
            ^^^^^^^
          instead:  n
    """),
    ("n c -> k[n] k[c]", """
        label 'k' is read at the same axes wherever it stands
            n c -> k[n] k[c]
                        ^^^^
          received: k[n] and k[c]
          instead:  another name for one of them
    """),
    ("n c n -> c", """
        'n' stands twice on one side
            n c n -> c
            ^   ^
          instead:  another name for one of them
    """),
    ("n (... c) -> n", """
        an ellipsis on the left stands for whole axes, so it cannot stand in a composition
            n (... c) -> n
               ^^^
          instead:  names for the axes of the composition
    """),
    ("n c -> 3", """
        the right side names axes; a size of its own has no meaning there
            n c -> 3
                   ^
          instead:  give the axis a name on the left, as in (a b), and its size as b=3
    """),
    ("n 0 -> n", """
        an axis without a name has a size of 1 or more, and one that fits in memory
            n 0 -> n
              ^
          instead:  1 for a unit axis, or a name
    """),
    ("n _c -> n", """
        the name of an axis is made of letters, digits and _, starting with a letter and not ending with _
            n _c -> n
              ^^
          received: '_c'
          instead:  'c'
    """),
    ("n: c -> n", """
        the pattern has names, numbers, ( ), [ ], ..., one comma and ->, and no ':'
            n: c -> n
             ^
          instead:  axes by name: "b t c -> b t"
    """),
    ("n\\tc\\t-> d", """
        the right side names the axis 'd', which x does not have
            n c -> d
                   ^
          received: the axes of x: n, c
          instead:  name it on the left too, or one of these
    """),
    (17, """
        a pattern is a string
          received: int: 17
          instead:  "n (g c) ... -> n g"
    """),
]  # fmt: skip


CALLS = [
    (lambda: normalize(x, "n (g c) t -> n g"), ShapeError, """
        (g c) is split into its axes when all sizes but one are known
            n (g c) t -> n g
               ^ ^
          received: x of shape (4, 32, 8); not known: g, c
          instead:  g=8; the divisors of 32 are 1, 2, 4, 8, 16, 32
    """),
    (lambda: normalize(x, "n (g c) t -> n g", g=5), ShapeError, """
        (g c) has size 32, which is not divisible by 5
            n (g c) t -> n g
              ^^^^^
          received: x of shape (4, 32, 8); g=5
          instead:  one of the divisors of 32: 1, 2, 4, 8, 16, 32
    """),
    (lambda: normalize(x, "n (g c) t -> n g", g=4, c=4), ShapeError, """
        the sizes of (g c) multiply to 16, and its size is 32
            n (g c) t -> n g
              ^^^^^
          received: x of shape (4, 32, 8); g=4, c=4
          instead:  sizes that multiply to 32
    """),
    (lambda: normalize(x, "n c -> n"), ShapeError, """
        the left side names every axis of x; it names 2, and x has 3
            n c -> n
            ^ ^
          received: x of shape (4, 32, 8)
          instead:  name every axis, or write "..." for those that need no name
    """),
    (lambda: normalize(x, "n c t ... d -> n"), ShapeError, """
        the left side names every axis of x; it names 4 or more, and x has 3
            n c t ... d -> n
            ^ ^ ^ ^^^ ^
          received: x of shape (4, 32, 8)
          instead:  a pattern for 3 axes
    """),
    (lambda: normalize(x, "n c t -> n", c=3), ShapeError, """
        axis 'c' has size 32 in x, and 3 was given
            n c t -> n
              ^
          received: x of shape (4, 32, 8); c=3
          instead:  c=32, or leave it out
    """),
    (lambda: normalize(x, "n 1 t -> n"), ShapeError, """
        1 and () stand for an axis of size 1, and x has 32 there
            n 1 t -> n
              ^
          received: x of shape (4, 32, 8)
          instead:  a name for the axis
    """),
    (lambda: normalize(x, "n 16 t -> n"), ShapeError, """
        the pattern says size 16, and x has 32 there
            n 16 t -> n
              ^^
          received: x of shape (4, 32, 8)
          instead:  32, or a name for the axis
    """),
    (lambda: normalize(x, "n c t -> n", k=3), SpecError, """
        'k' is no axis and no label of the pattern, and no option
            n c t -> n
          received: k=3; axes: n, c, t; labels: none
          instead:  leave k= out, or name it in the pattern
    """),
    (lambda: normalize(x, "n c t -> n", esp=1e-3), SpecError, """
        'esp' is no axis and no label of the pattern, and no option
            n c t -> n
          received: esp=0.001; axes: n, c, t; labels: none
          instead:  eps=...
    """),
    (lambda: normalize(x, "n (g c) t -> n g", sizes={"(g d)": 3}), SpecError, """
        '(g d)' is no axis and no composition of the pattern
            n (g c) t -> n g
          received: (g d)=3; the pattern has n, g, c, t, (g c)
          instead:  '(g c)'
    """),
    (lambda: normalize(x, "n (g c) t -> n g", g=2.0), SpecError, """
        the size of 'g' is a whole number of 0 or more
            n (g c) t -> n g
               ^
          received: g=2.0
          instead:  g=8
    """),
    (lambda: normalize(x, "n (g c) t -> n g", g=-2), SpecError, """
        the size of 'g' is a whole number of 0 or more
            n (g c) t -> n g
               ^
          received: g=-2
          instead:  g=2
    """),
    (lambda: normalize(x, "n (g c) t -> n g", g=2, sizes={"g": 2}), SpecError, """
        'g' is given once
            n (g c) t -> n g
          received: g=2, and again in sizes=
          instead:  leave one out
    """),
    (lambda: normalize(x, "n (eps c) t -> n eps", eps=4, c=8), SpecError, """
        'eps' is an option, and the pattern has an axis of this name
            n (eps c) t -> n eps
               ^^^
          received: eps=4
          instead:  sizes={"eps": 4} for the axis, eps=4.0 for the option
    """),
    (lambda: normalize(x, "n (eps c) t -> n eps"), ShapeError, """
        (eps c) is split into its axes when all sizes but one are known
            n (eps c) t -> n eps
               ^^^ ^
          received: x of shape (4, 32, 8); not known: eps, c
          instead:  sizes={"eps": 8}, as 'eps' is an option; the divisors of 32 are 1, 2, 4, 8, 16, 32
    """),
    (lambda: normalize(x, "n c t -> kind[c]"), SpecError, """
        label 'kind' is read, and not given
            n c t -> kind[c]
                     ^^^^^^^
          instead:  kind=ids
    """),
    (lambda: normalize(x, "n c t -> mask[c]"), SpecError, """
        label 'mask' is read, and not given
            n c t -> mask[c]
                     ^^^^^^^
          instead:  labels={"mask": ids}, as 'mask' is an option
    """),
    (lambda: normalize(x, "n c t -> kind[c]", kind=[1, 2]), SpecError, """
        label 'kind' is given as a tensor of ids, or as a Partition
            n c t -> kind[c]
                     ^^^^^^^
          received: kind=[1, 2]
          instead:  kind=Partition.from_sizes([2, 1]) for sizes, kind=torch.tensor([0, 0, 1]) for ids
    """),
    (lambda: normalize(x, "n c t -> kind[c]", kind=ids.numpy()), SpecError, """
        label 'kind' is given as a tensor of ids, or as a Partition
            n c t -> kind[c]
                     ^^^^^^^
          received: kind=a ndarray of int64, shape (32,)
          instead:  kind=torch.from_numpy(ids)
    """),
    (lambda: normalize(x, "n c t -> kind[c]", kind=ids[2:]), ShapeError, """
        label 'kind' has one id at every index, (c): shape (32,)
            n c t -> kind[c]
                     ^^^^^^^
          received: shape (30,); n=4, c=32, t=8
          instead:  ids of shape (32,), or sizes that add up to 32
    """),
    (lambda: normalize(x, "n c t -> kind[c]", kind=ids - 1), ShapeError, """
        label 'kind' cannot be read
            n c t -> kind[c]
                     ^^^^^^^
        ids are from 0 to count - 1 = 30
          received: 1 of 32 outside, the first is -1
          instead:  number the groups from 0
    """),
    (lambda: Norm("n c t -> kind[c]", kind=4)(x, kind=ids), ShapeError, """
        label 'kind' cannot be read
            n c t -> kind[c]
                     ^^^^^^^
        ids are from 0 to count - 1 = 3
          received: 28 of 32 outside, the first is 4
          instead:  count=32
    """),
    (lambda: normalize(x, "n c t -> kind[c]", kind=ids.float()), SpecError, """
        label 'kind' cannot be read
            n c t -> kind[c]
                     ^^^^^^^
        ids are integers
          received: a tensor of torch.float32
          instead:  convert it with .long()
    """),
    (lambda: Norm("n c t -> kind[c]", kind=4)(x, kind=Partition(ids)), ShapeError, """
        label 'kind' has 4 values, as was told when the layer was built
            n c t -> kind[c]
                     ^^^^^^^
          received: kind=Partition(32 ids, count=32)
          instead:  kind=Partition(ids, count=4)
    """),
    (lambda: normalize(x, "n c t, n t -> n", torch.ones(4, 32)), ShapeError, """
        the mask has the axes behind the comma, (n t): shape (4, 8)
            n c t, n t -> n
                   ^ ^
          received: shape (4, 32); n=4, c=32, t=8
          instead:  "n c", if these are its axes
    """),
    (lambda: normalize(x, "n c t, n t -> n", torch.ones(4, 8).long()), SpecError, """
        a mask is a bool tensor (membership, True = valid) or a floating one (weights)
            n c t, n t -> n
                   ^ ^
          received: a tensor of torch.int64
          instead:  mask.bool(), or mask.float() for weights
    """),
    (lambda: normalize(x, "n c t, n t -> n", torch.full((4, 8), -torch.inf)), ShapeError, """
        the weights of a floating mask are finite and 0 or more
            n c t, n t -> n
                   ^ ^
          received: weights from -inf to -inf
          instead:  a bool mask; (mask == 0), if this is an additive one with -inf where nothing is valid
    """),
    (lambda: normalize(x, "n c t -> n", torch.ones(4, 8, dtype=torch.bool)), SpecError, """
        a mask is given, and the pattern does not say what its axes are
            n c t -> n
                     ^
          received: a Tensor of torch.bool, shape (4, 8)
          instead:  "n c t, n t -> n"
    """),
    (lambda: normalize(x, "n c t -> kind[c]", ids), SpecError, """
        a mask is given, and the pattern does not say what its axes are
            n c t -> kind[c]
                     ^^^^^^^
          received: a Tensor of torch.int64, shape (32,)
          instead:  "n c t, c -> kind[c]", or kind=ids if it is this label
    """),
    (lambda: normalize(x.long(), "n c t -> n"), SpecError, """
        x is a floating or complex tensor
            n c t -> n
            ^ ^ ^
          received: x of torch.int64
          instead:  x.float()
    """),
    (lambda: normalize([1.0], "n -> "), SpecError, """
        x is a torch.Tensor
            n ->
            ^
          received: list
          instead:  torch.as_tensor(x)
    """),
    (lambda: normalize(x, "n c t -> n", weight=torch.ones(3)), SpecError, """
        weight is given, and affine= does not say what its axes are
            n c t -> n
          received: a Tensor of torch.float32, shape (3,)
          instead:  affine="c", say
    """),
    (lambda: normalize(x, "n c t -> n", weight=torch.ones(8), affine="c"), ShapeError, """
        weight has the axes c: shape (32,)
            c
            ^
          received: weight of shape (8,); n=4, c=32, t=8
          instead:  "t", if these are its axes
    """),
    (lambda: normalize(x, "n c t -> n", affine="c"), SpecError, """
        these are the axes of weight and bias, and neither is given
            c
            ^
          instead:  weight=w, bias=b, or no affine=
    """),
    (lambda: normalize(x, "n c t -> n", affine="d", weight=x), SpecError, """
        affine= names the axis 'd', which x does not have
            d
            ^
          received: the axes of x: n, c, t
          instead:  name it on the left too, or one of these
    """),
    (lambda: normalize(x, "n c t -> n", activation="tanh"), SpecError, """
        activation is one of 'relu', 'silu', 'gelu', or None
          received: activation='tanh'
          instead:  None, and your own on the result
    """),
    (lambda: normalize(x, "n c t -> n", center=False, scale=False), SpecError, """
        a norm subtracts the mean, divides by sigma, or both
          received: center=False, scale=False
          instead:  center=False for RMSNorm, scale=False to subtract the mean only
    """),
    (lambda: normalize(x, "n c t -> n", eps="1e-5"), SpecError, """
        eps is a number
          received: eps='1e-5'
          instead:  eps=1e-5
    """),
    (lambda: normalize(x, "n c t -> n", moments=Moments(*[torch.zeros(32)] * 3)), ShapeError, """
        moments are shaped as the right side says: shape (4,)
            n c t -> n
                     ^
          received: moments of shape (32,); n=4, c=32, t=8
          instead:  moments(x, "... -> n"), or m.coarsen(...) of finer ones
    """),
    (lambda: normalize(x, "n c t -> n", moments=(0, 1)), SpecError, """
        moments= takes Moments
          received: moments=(0, 1)
          instead:  moments=flexnorm.moments(x, pattern)
    """),
    (lambda: Norm("n (g c) t -> n g", affine="(g c)", g=4), SpecError, """
        the parameters need the size of axis 'c' when the layer is built
            (g c)
               ^
          received: g=4
          instead:  c=8, or the size of all: sizes={"(g c)": 64}
    """),
    (lambda: Norm("v c -> type[v] c", affine="type[v] c", c=4), SpecError, """
        the parameters need the number of values of label 'type' when the layer is built
            type[v] c
            ^^^^^^^
          received: c=4
          instead:  type=8
    """),
    (lambda: Norm("n ... -> n", affine="..."), SpecError, """
        the parameters have a fixed shape: their axes have names
            ...
            ^^^
          instead:  names for these axes, and their sizes
    """),
    (lambda: Norm("n c -> n", affine=3), SpecError, """
        affine is a string that names the axes of the parameters
          received: int: 3
          instead:  affine="c"
    """),
    (lambda: Norm("n c -> n", affine="c -> n"), SpecError, """
        affine= names axes of x, without comma and arrow
            c -> n
              ^^
          instead:  affine="c"
    """),
    (lambda: Norm("n c t -> n")(x, graph=ids), SpecError, """
        'graph' is no label of this layer
            n c t -> n
          received: graph=a Tensor of torch.int64, shape (32,)
          instead:  one of: none
    """),
    (lambda: Norm("n c t -> n kind[c]", kind=ids)(x, kind=3), SpecError, """
        'kind' is a static label of this layer
            n c t -> n kind[c]
          received: kind=3
          instead:  build the layer without kind= to give it at every call
    """),
    (lambda: Norm("n (g c) t -> n g", g=4)(x, g=2), SpecError, """
        'g' is no label of this layer
            n (g c) t -> n g
          received: g=2
          instead:  Norm(..., g=2): sizes of axes are told when the layer is built
    """),
    (lambda: Norm("n c t -> kind[c]")(x, kind=ids, labels={"kind": ids}), SpecError, """
        'kind' is given once
            n c t -> kind[c]
          received: kind=a Tensor of torch.int64, shape (32,), and again in labels=
          instead:  leave one out
    """),
    (lambda: normalize(x, "... t -> kind[...] t", kind=ids), ShapeError, """
        label 'kind' has one id at every index, (...): shape (4, 32)
            ... t -> kind[...] t
                     ^^^^^^^^^
          received: shape (32,); ...=4, ...=32, t=8
          instead:  ids of shape (4, 32)
    """),
    (lambda: normalize(x[0, 0], "t ... -> kind[...]", kind=ids[0]), ShapeError, """
        label 'kind' is read at ..., which stands for no axis of x
            t ... -> kind[...]
                     ^^^^^^^^^
          received: x of shape (8,)
          instead:  no label, or an x with more axes
    """),
    (lambda: normalize(x, "n c t -> n", scale=8), SpecError, """
        scale is True or False
          received: scale=8
          instead:  scale=False; of an axis, sizes={'scale': 8}
    """),
    (lambda: normalize(x, "n c t -> n", sizes=[3]), SpecError, """
        sizes= is a dict from names
          received: sizes=[3]
          instead:  sizes={"name": ...}
    """),
    (lambda: normalize(x, "n c t -> n", moments=Moments(24, 0.0, 1.0)), SpecError, """
        the fields of Moments are tensors
          received: count=24
          instead:  count=torch.tensor(...)
    """),
    (lambda: normalize(x.to_sparse(), "n c t -> n"), SpecError, """
        x is a dense tensor
            n c t -> n
            ^ ^ ^
          received: x of layout torch.sparse_coo
          instead:  x.values() of a jagged tensor, and Partition.from_offsets(x.offsets()) as a label of its rows
    """),
    (lambda: Norm("v c -> ty[v] c", affine="ty[v] c", conditional="c", ty=2, c=8)(x[0], weight=x[0, 0]), SpecError, """
        label 'ty' is read, and not given
            v c -> ty[v] c
                   ^^^^^
          instead:  ty=ids
    """),
    (lambda: Norm("n c t -> n", affine="c", c=32, dtype=torch.int64), SpecError, """
        bias is True or False, and dtype floating or complex
          received: bias=True, dtype=torch.int64
          instead:  bias=False, dtype=torch.float32
    """),
    (lambda: Norm("n c t -> n")(x, weight=x), SpecError, """
        weight and bias are given at the call to a layer that was built for them
            n c t -> n
          received: weight
          instead:  Norm(..., conditional="b c"), with the axes of weight and bias
    """),
    (lambda: Norm("n c t -> n", conditional="n c")(x), SpecError, """
        a conditional layer is called with weight, bias, or both
            n c
            ^ ^
          received: neither
          instead:  norm(x, weight=w, bias=b)
    """),
]  # fmt: skip


def expected(text):
    return "\n".join(line.rstrip() for line in textwrap.dedent(text).strip().splitlines())


def received(error):
    return "\n".join(line.rstrip() for line in str(error).splitlines())


@pytest.mark.parametrize(("pattern", "text"), PATTERNS, ids=[str(pattern) for pattern, _ in PATTERNS])
def test_bad_pattern(pattern, text):
    with pytest.raises(SpecError) as caught:
        normalize(torch.zeros(2, 2), pattern.replace("\\t", "\t") if isinstance(pattern, str) else pattern)
    assert received(caught.value) == expected(text)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(("call", "kind", "text"), CALLS, ids=[expected(text).splitlines()[0] for *_, text in CALLS])
def test_bad_call(call, kind, text):
    with pytest.raises(kind) as caught:
        call()
    assert received(caught.value) == expected(text)
    assert type(caught.value) is kind
    assert type(pickle.loads(pickle.dumps(caught.value))) is kind


def test_every_error_says_what_to_type():
    for text in [text for _, text in PATTERNS] + [text for *_, text in CALLS]:
        assert "instead:" in text


def test_nothing_is_changed_by_a_bad_call():
    norm = Norm("v c -> graph[v] c", affine="c", c=3)
    before, state = torch.randn(4, 3), norm.state_dict()
    x = before.clone()
    for bad in ([0, 1], torch.tensor([0, 1]), torch.tensor([0, -1, 0, 0]), None):
        with pytest.raises((SpecError, ShapeError)):
            norm(x, graph=bad) if bad is not None else norm(x)
    assert torch.equal(x, before)
    assert all(torch.equal(a, b) for a, b in zip(norm.state_dict().values(), state.values(), strict=True))


def test_draw():
    assert draw("n c -> d", [(7, 8)]) == "    n c -> d\n           ^"
    assert draw("n", [(1, 1)]) == "    n\n     ^"
    assert draw("n\tc", [(2, 3), (0, 1)]) == "    n c\n    ^ ^"
    assert draw("n c", []) == "    n c"


@pytest.mark.parametrize("given", [{}, {"affine": "c  "}, {"g": 2}])
def test_an_error_shows_the_pattern_as_this_call_has_it(given):
    # Equal patterns share what is worked out for them, and never their spelling.
    for spelling in ("n c->n", "n  c  ->  n", " n c -> n"):
        text = spelling.replace("c", "(g c)") if "g" in given else spelling
        with pytest.raises(ShapeError) as caught:
            normalize(torch.zeros(2, 3, 4), text, **given)
        assert f"  {text}\n" in str(caught.value)


def test_complex_values_show_it_too():
    for spelling in ("n c->n", "n  c  ->  n"):
        with pytest.raises(ShapeError) as caught:
            normalize(torch.zeros(2, 3, 4, dtype=torch.complex64), spelling)
        assert f"  {spelling}\n" in str(caught.value)
