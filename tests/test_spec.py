"""The pattern language: what parses, what it means beside einops, and that a bad string gives a SpecError."""

import contextlib
import random

import cases
import einops
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flexnorm import ShapeError, SpecError, moments, normalize
from flexnorm.spec import Axis, Group, Lookup, Spec


@pytest.mark.parametrize("case", **cases.each)
def test_str_round_trips(case):
    spec = Spec.parse(case.pattern)
    assert Spec.parse(str(spec)) == spec
    assert hash(Spec.parse(str(spec))) == hash(spec)
    assert str(Spec.parse(str(spec))) == str(spec)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("n(g c)...->n g", "n (g c) ... -> n g"),
        ("  b  t (g   c),b t  ->b t g ", "b t (g c), b t -> b t g"),
        ("n c -> (n) ()", "n c -> n 1"),
        ("n (1 c) -> (1)", "n c -> 1"),
        ("n c->kind [ c ]", "n c -> kind[c]"),
        ("n c -> (n kind[c])", "n c -> (n kind[c])"),
        ("->", "->"),
        ("... -> (...)", "... -> (...)"),
    ],
)
def test_normal_form(text, normal):
    assert str(Spec.parse(text)) == normal


def test_parts():
    spec = Spec.parse("b (g c) t, b t -> b band[g] g")
    assert spec.x.elements == (Axis("b"), Group((Axis("g"), Axis("c"))), Axis("t"))
    assert spec.mask.elements == (Axis("b"), Axis("t"))
    assert spec.sets.elements == (Axis("b"), Lookup("band", (Axis("g"),)), Axis("g"))


def test_places_in_the_text_are_kept():
    text = "b (g c) t, b t -> b band[g]"
    spec = Spec.parse(text)
    for expr in (spec.x, spec.mask, spec.sets):
        for element in expr.elements:
            start, stop = element.span
            assert text[start:stop] == str(element)


NAMES = ["n", "c", "h2", "time", "g_1"]


@st.composite
def dense_patterns(draw):
    """A string, nearly always a pattern of einops.reduce; a shape for its left side; sizes of 2 for its axes."""
    used = draw(st.permutations(NAMES))[: draw(st.integers(0, 5))]
    left = []  # pairs of a text and the sizes that it stands for
    for name in used:
        kind = draw(st.sampled_from(["plain", "plain", "pair", "unit", "number"]))
        if kind == "pair" and left and left[-1][0].isidentifier():
            left[-1] = (f"({left[-1][0]} {name})", [4])
        elif kind == "number":
            left.append((f"({name} 3)", [6]))
        else:
            left += [(draw(st.sampled_from(["1", "()", "(1)"])), [1])] * (kind == "unit") + [(name, [2])]
    if draw(st.booleans()):
        left.insert(draw(st.integers(0, len(left))), ("...", [2, 3]))
    right = draw(st.permutations(used))[: draw(st.integers(0, len(used)))]
    if draw(st.booleans()) and len(right) > 1:
        right = [f"({' '.join(right[:2])})", *right[2:]]
    right += draw(
        st.sampled_from([[], [], ["1"], ["()"], ["..."], ["(...)"], ["q"], ["n"], ["2"], ["..."] * 2, ["(("]])
    )
    text = f"{' '.join(piece for piece, _ in left)} -> {' '.join(right)}"
    return text, [size for _, sizes in left for size in sizes], dict.fromkeys(used, 2)


@settings(max_examples=500, deadline=None)
@given(dense_patterns())
@example(("(h 2) (w 2) c -> h w c", [4, 6, 3], {}))
@example(("n ... -> (...) n", [2, 3, 4], {}))
@example(("n c ->", [2, 3], {}))
def test_a_pattern_without_labels_and_mask_is_one_of_einops(drawn):
    """Both accept it, and mean the same; or both refuse it."""
    text, shape, sizes = drawn
    x = torch.randn(shape, dtype=torch.float64)
    try:
        expected = einops.reduce(x, text, "mean", **sizes)
    except einops.EinopsError:
        with pytest.raises(SpecError):
            Spec.parse(text)
    else:
        torch.testing.assert_close(moments(x, text, sizes=sizes).mean, expected, rtol=1e-12, atol=1e-12)


PIECES = [
    "n",
    "c",
    "g",
    "t",
    "graph",
    "[",
    "]",
    "(",
    ")",
    ",",
    "->",
    "...",
    "1",
    "2",
    " ",
    " ",
    "-",
    ".",
    "é",
    "_",
    "0",
    "\n",
    ">",
    "%",
]


def test_ten_thousand_random_strings_raise_nothing_but_spec_errors():
    """Strings of pieces of the language, of its characters, and of any characters at all."""
    rng = random.Random(0)
    parsed = 0
    for number in range(10_000):
        alphabet = (PIECES, list("nc gt()[],->.1"), [chr(c) for c in range(1, 0x2FF)])[number % 3]
        text = "".join(rng.choice(alphabet) for _ in range(rng.randint(0, 14)))
        if rng.random() < 0.7 and "->" not in text:
            text += " -> " + rng.choice(["n", "c", "", "graph[n]"])
        try:
            spec = Spec.parse(text)
        except SpecError:
            continue
        parsed += 1
        assert Spec.parse(str(spec)) == spec
    assert parsed > 200  # the fuzz reaches what lies behind the parser


@pytest.mark.parametrize(
    "text", ["n" * 100_000 + " -> ", "9" * 5000 + " -> ", "n " * 2000 + "->", "(" * 5000, "\x00 -> \x00"]
)
def test_monstrous_strings(text):
    with contextlib.suppress(SpecError):  # it may parse; nothing else may come out
        Spec.parse(text)


def test_any_string_that_parses_runs_or_says_what_is_wrong():
    rng = random.Random(1)
    x = torch.randn(2, 3, 4)
    ran = 0
    for _ in range(3000):
        left = [rng.choice(choice) for choice in (["n", "1", "2"], ["c", "(a c)", "..."], ["t", "(b t)", "4", "..."])]
        left = left[: rng.choice([2, 3, 3, 3, 3])]
        right = [
            rng.choice(["n", "c", "t", "a", "graph[n]", "kind[c t]", "()", "..."]) for _ in range(rng.randint(0, 2))
        ]
        text = f"{' '.join(left)}{rng.choice([', c t', '', ''])} -> {' '.join(right)}"
        labels = {"graph": torch.tensor([0, 1]), "kind": torch.zeros(3, 4, dtype=torch.long)}
        labels = {name: ids for name, ids in labels.items() if name in text}
        try:
            y = normalize(x, text, torch.rand(3, 4) < 0.5 if "," in text else None, labels=labels)
        except (SpecError, ShapeError):
            continue
        assert y.shape == x.shape
        ran += 1
    assert ran > 300
