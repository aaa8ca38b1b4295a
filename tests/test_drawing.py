"""Pictures: which element is in which set is compared with the oracle, and the shapes on the page with that."""

import colorsys
import itertools
import math
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import matplotlib
import pytest
import torch
from cases import arguments, each
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex, to_rgb
from oracle import Pattern

from flexnorm import Norm, Partition, ShapeError, SpecError, drawing
from flexnorm.drawing import HUES, MASKED, PALETTE, draw


def picture(*patterns, shape=None, mask=None, labels=None, sizes=None, **names):
    found = drawing._pictures(patterns, shape, mask, labels, sizes, None, names)
    return found[0] if len(found) == 1 else found


def places(drawn):
    """For every cell of a picture, the index of its element along every elementary axis."""
    sides = [list(itertools.product(*(drawn.picks[p] for p in side.places))) for side in drawn.sides]
    for cell in itertools.product(*(range(len(sides[i])) for i in drawn.order)):
        index = {}
        for i, at in zip(drawn.order, cell, strict=True):
            index.update(zip(drawn.sides[i].places, sides[i][at], strict=True))
        yield cell, [index[p] for p in range(len(drawn.picks))]


# --- which set -------------------------------------------------------------------------------------------------------


def check_sets(pattern, drawn, kwargs):
    """Two elements are in one set of the picture where they are in the oracle, and masked where they are there."""
    shape = tuple(getattr(kwargs["shape"], "shape", kwargs["shape"]))
    oracle = Pattern(pattern, shape, kwargs["sizes"], kwargs["labels"])
    mask, number = kwargs["mask"], {}
    for cell, index in places(drawn):
        element = dict(zip(oracle.names, index, strict=True))
        shown = int(drawn.ids[cell])
        weight = 1 if mask is None else mask[oracle.mask_place(element)]
        if mask is not None and mask.dtype == torch.bool and not weight:
            assert shown == -1
            continue
        assert shown >= 0
        assert number.setdefault(oracle.place(oracle.right, element), shown) == shown
        if drawn.weights is not None:
            assert float(drawn.weights[cell]) == float(weight)
    assert len(set(number.values())) == len(number)
    members = oracle.sets()
    if mask is not None and mask.dtype == torch.bool:
        members = {k: [i for i in v if mask[oracle.mask_place(oracle.elements[i])]] for k, v in members.items()}
    counts = [len(v) for v in members.values() if v]
    least, most = (min(counts), max(counts)) if counts else (0, 0)
    told = " ".join(drawn.words()[:2])
    assert f"{math.prod(oracle.shape(oracle.right)):,} set" in told
    assert (f"{least:,} element" if least == most else f"{least:,} to {most:,} elements") in told
    empty = math.prod(oracle.shape(oracle.right)) - len(counts)
    assert (f"; {empty:,} empty" in told) == (empty > 0)


@pytest.mark.parametrize("case", **each)
def test_every_case_is_drawn_and_its_sets_are_those_of_the_oracle(case):
    x, kwargs = arguments(case)
    read = case.pattern.split("->")[1]
    labels = {name: value for name, value in kwargs["labels"].items() if f"{name}[" in read}
    kwargs = {"shape": x, "mask": kwargs.get("mask"), "labels": labels, "sizes": case.sizes}
    figure, drawn = draw(case.pattern, **kwargs), picture(case.pattern, **kwargs)
    check_sets(case.pattern, drawn, kwargs)
    check_page(figure, drawn)
    check_names(figure, drawn)


LARGE = [
    ("n (g c) ... -> n g", (3, 32, 9, 9), {"g": 4}, None, {}),
    ("b (g c) t h w -> b t g", (2, 12, 8, 6, 5), {"g": 2}, None, {}),
    ("a b c d e -> a c e", (4, 4, 4, 4, 4), {}, None, {}),
    ("a b c d e, b d -> a", (2, 3, 4, 4, 4), {}, (3, 4), {}),
    ("n h w c -> c", (3, 9, 9, 20), {}, None, {}),
    ("b (g c) t, b t -> b g", (7, 16, 50), {"g": 8}, (7, 50), {}),
    ("v c -> graph[v] c", (300, 20), {}, None, {"graph": ((300,), 90)}),
    ("n c f t -> n c band[f]", (2, 3, 80, 20), {}, None, {"band": ((80,), 12)}),
    ("n c h w -> n region[n h w]", (5, 3, 20, 30), {}, None, {"region": ((5, 20, 30), 4)}),
    ("v t c -> graph[v] t", (40, 9, 8), {}, None, {"graph": ((40,), 3)}),
    ("t c -> c (doc[t] part[t])", (100, 12), {}, None, {"doc": ((100,), 3), "part": ((100,), 2)}),
    ("(h 20) c -> h", (100, 9), {}, None, {}),
]


@pytest.mark.parametrize(("pattern", "shape", "sizes", "mask", "labels"), LARGE, ids=[row[0] for row in LARGE])
def test_what_is_drawn_of_a_large_tensor_is_some_of_its_elements(pattern, shape, sizes, mask, labels):
    g = torch.Generator().manual_seed(1)
    made = {name: Partition(torch.randint(0, k, size, generator=g), k) for name, (size, k) in labels.items()}
    valid = None if mask is None else torch.rand(mask, generator=g) < 0.6
    kwargs = {"shape": shape, "sizes": sizes, "labels": made, "mask": valid}
    figure, drawn = draw(pattern, **kwargs), picture(pattern, **kwargs)
    assert drawn.ids.numel() <= 600
    assert drawn.shortened
    assert "Axes are drawn shortened" in " ".join(texts(figure))
    check_sets(pattern, drawn, kwargs)
    check_page(figure, drawn)
    check_names(figure, drawn)


def test_of_labels_all_values_are_drawn_and_larger_ones_are_larger():
    sizes = [5, 5, 6, 8, 10, 12, 14, 20]
    drawn = picture("f t -> band[f]", shape=(80, 300), band=Partition.from_sizes(sizes))
    rows = drawn.ids[:, 0].bincount()
    assert len(rows) == 8
    assert rows.tolist() == sorted(rows.tolist())
    assert rows[-1] >= 2 * rows[0]


def test_of_many_groups_a_few_are_drawn_with_several_elements_each():
    graph = torch.randint(0, 900, (6000,))
    drawn = picture("v c -> graph[v]", shape=(6000, 8), graph=graph)
    ids = graph[list(drawn.picks[0])]
    assert list(drawn.picks[0]) == sorted(drawn.picks[0])  # in their own order
    assert min(ids.unique(return_counts=True)[1].tolist()) >= 3


# --- what is on the page ---------------------------------------------------------------------------------------------


def polygons(figure, panel):
    """The cells of a panel, as (corners, colour), those that are masked by themselves."""
    found = {False: [], True: []}
    for drawn in figure.axes[0].collections:
        if isinstance(drawn, PolyCollection) and str(drawn.get_gid()).removesuffix(" masked") == panel:
            masked = drawn.get_gid().endswith(" masked")
            assert bool(drawn.get_hatch()) == masked
            colours = [to_hex(colour) for colour in drawn.get_facecolor()]
            corners = [tuple(tuple(p) for p in path.vertices[:4].round(3).tolist()) for path in drawn.get_paths()]
            found[masked] += zip(corners, colours, strict=True)
    return found[False], found[True]


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def check_page(figure, drawn):
    """Colours stand where the sets are, and nothing reaches over the page."""
    ids = drawn.ids
    if not drawn.flat:  # of every block three faces: above, in front, at the side
        blocks = ids.reshape(-1, *ids.shape[-3:])
        faces = [[b[:, :, 0].flip(0), b[0].T, b[:, -1].T] for b in blocks]
        ids = torch.cat([face.flatten() for block in faces for face in block])
    ids = ids.flatten().tolist()
    for panel in ("one set", "all sets"):
        cells, masked = polygons(figure, panel)
        assert len(masked) == ids.count(-1)
        assert {colour for _, colour in masked} <= {MASKED}
        shown = [number for number in ids if number >= 0]
        colours = [colour for _, colour in cells]
        assert len(colours) == len(shown)
        if drawn.weights is None:
            alone = {drawn.one: drawing.ONE}
            wanted = drawn.colours if panel == "all sets" else {n: alone.get(n, drawing.OTHER) for n in shown}
            assert colours == [wanted[n] for n in shown]
    figure.canvas.draw()
    page = figure.bbox.padded(1)
    for text in figure.axes[0].texts:
        box = text.get_window_extent()
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1, text


def check_names(figure, drawn):
    """Every axis is named, with its size."""
    said = texts(figure)
    for which in range(len(drawn.sides)):
        assert any(drawn.name(which, room) in said for room in (0, math.inf))
    sizes = sorted(drawn.axes.sizes)
    numbers = [drawn.name(i, 0).split("= ")[1] for i in range(len(drawn.sides))]
    assert sorted(int(n.replace(",", "")) for name in numbers for n in name.split(drawing.TIMES)) == sizes


def test_faces_of_a_block_meet_in_the_elements_they_share():
    figure = draw("n c t -> n c t", shape=(2, 2, 4))
    cells, _ = polygons(figure, "all sets")
    assert len({colour for _, colour in cells}) == 4 + 8 + 8 - (2 + 2 + 4) + 1  # of 16 elements, those to be seen
    edges = {}
    for corners, colour in cells:
        for edge in zip(corners, corners[1:] + corners[:1], strict=True):
            edges.setdefault(frozenset(edge), []).append(colour)
    alike = [colours for colours in edges.values() if len(colours) == 2 and len(set(colours)) == 1]
    assert len(alike) == 2 + 2 + 4  # an edge between two faces is one of one element


def test_no_two_sets_look_alike_while_colours_last():
    drawn = picture("v c -> kind[v] c", shape=(16, 4), kind=torch.arange(16) % 8)
    assert len(drawn.colours) == len(set(drawn.colours.values())) == len(PALETTE) == 32
    assert len(set(PALETTE)) == 32
    drawn = picture("b t c, b t -> b t c", shape=(3, 8, 4), mask=torch.ones(3, 8, dtype=torch.bool))
    assert len(drawn.colours) > 32
    for d in range(3):  # and then, none beside its like
        pairs = zip(drawn.ids.narrow(d, 0, drawn.ids.shape[d] - 1).flatten().tolist(),
                    drawn.ids.narrow(d, 1, drawn.ids.shape[d] - 1).flatten().tolist(), strict=True)  # fmt: skip
        assert all(drawn.colours[a] != drawn.colours[b] for a, b in pairs)
    assert "all sets; colours repeat" in texts(draw("b t c, b t -> b t c", shape=(3, 8, 4)))


def test_the_sets_of_one_label_have_one_hue():
    drawn = picture("v c -> kind[v] c", shape=(6, 3), kind=torch.tensor([0, 1, 0, 1, 1, 0]))

    def hue(colour):
        return round(colorsys.rgb_to_hsv(*to_rgb(colour))[0], 1)

    hues = [{hue(drawn.colours[n]) for n in row} for row in drawn.ids.tolist()]
    assert all(len(row) == 1 for row in hues)
    assert hues[0] == hues[2] == hues[5] != hues[1] == hues[3] == hues[4]


def test_ids_of_labels_stand_beside_their_axis_in_their_own_order():
    figure = draw("v c -> graph[v] c", shape=(6, 2), graph=torch.tensor([7, 2, 2, 0, 7, 2]))
    said = texts(figure)
    at = said.index("graph")
    assert said[at - 5 : at] == ["7", "2", "0", "7", "2"]  # a run once


def test_smaller_weights_are_paler():
    figure = draw("t, t -> ", shape=(3,), mask=torch.tensor([0.0, 1.0, 2.0]))
    cells, masked = polygons(figure, "all sets")
    light = [sum(to_rgb(colour)) for _, colour in cells]
    assert light == sorted(light, reverse=True)
    assert cells[2][1] == HUES[0]
    assert not masked
    assert "paler: smaller weight" in texts(figure)


# --- several patterns, layers, examples ------------------------------------------------------------------------------


def test_several_patterns_stand_side_by_side():
    patterns = ["n c h w -> c", "n c h w -> n", "n c h w -> n c", "n (g c) h w -> n g"]
    titles = ["Batch", "Layer", "Instance", "Group"]
    figure = draw(*patterns, shape=(8, 64, 32, 32), g=4, titles=titles)
    where = {text.get_text(): text.get_position() for text in figure.axes[0].texts}
    assert [where[title][0] for title in titles] == sorted(where[title][0] for title in titles)
    assert len({where[title][1] for title in titles}) == 1
    assert set(patterns) <= set(where)
    assert "512 sets, one for each n, c" in where
    alone = len(polygons(draw(patterns[0], shape=(8, 64, 32, 32)), "all sets")[0])
    assert len(polygons(figure, "all sets")[0]) > 3 * alone


def test_a_name_goes_to_the_patterns_that_have_it_and_a_mask_too():
    first, second = picture(
        "b t (g c), b t -> b g", "b t c -> b", shape=(2, 4, 6), g=2, mask=torch.ones(2, 4, dtype=torch.bool)
    )
    assert first.recipe.sets.count == 4
    assert second.mask is None


def test_a_layer_is_drawn_with_its_own_sizes_and_labels():
    layer = Norm("n (g c) t -> n g", affine="(g c)", g=2, sizes={"(g c)": 6})
    assert picture(layer, shape=(2, 6, 5)).recipe.sets.count == 4
    band = Partition.from_sizes([2, 3])
    drawn = picture(Norm("f t -> band[f]", affine="band[f]", band=band), shape=(5, 4))
    assert drawn.ids[:, 0].tolist() == [0, 0, 1, 1, 1]
    assert not drawn.examples
    typed = Norm("v c -> v", affine="type[v] c", type=3, c=4)
    assert picture(typed, shape=(5, 4), type=torch.zeros(5, dtype=torch.long)).recipe.sets.count == 5
    drawn = picture(Norm("v c -> type[v] c", affine="type[v] c", type=3, c=4), shape=(9, 4))
    assert drawn.examples == ("type",)
    assert drawn.recipe.sets.count == 12


class Named(Norm):
    pass


def test_a_layer_of_another_class_is_called_so():
    assert "Named" in texts(draw(Named("n c -> n"), shape=(2, 3)))
    assert "Norm" not in texts(draw(Norm("n c -> n"), shape=(2, 3)))


def test_what_is_not_given_is_an_example_and_called_so():
    figure = draw("b t c, b t -> b kind[c]", shape=(3, 20, 8))
    assert any("The values of mask and kind are examples." in text for text in texts(figure))
    assert polygons(figure, "all sets")[1]
    assert picture("v c -> graph[v]", shape=(20, 3), graph=6).recipe.sets.count == 6


def test_without_a_shape_no_size_is_said_that_nobody_told():
    said = texts(draw("n (g c) ... -> n g"))
    assert {"n", "(g c)", "..."} <= set(said)
    assert "one set for each n, g" in said
    assert not any(character.isdigit() for text in said for character in text)
    said = texts(draw("v c -> graph[v] c", graph=torch.tensor([0, 1, 1])))
    assert "v = 3" in said and "c" in said


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_the_same_arguments_write_the_same_bytes(tmp_path, ending):
    mask = torch.arange(9) < torch.tensor([[4], [9]])
    for name in ("a", "b"):
        with matplotlib.rc_context({"svg.hashsalt": name, "hatch.linewidth": len(name) + ord(name), "font.size": 30}):
            draw("b c t, b t -> b", shape=(2, 3, 9), mask=mask, path=tmp_path / f"{name}.{ending}")
    first, second = ((tmp_path / f"{name}.{ending}").read_bytes() for name in ("a", "b"))
    assert first == second
    assert len(first) < 200_000
    if ending == "svg":
        root = ElementTree.fromstring(first)
        assert root.tag.endswith("svg")
        assert b"b c t, b t -&gt; b" in first  # its title
        assert b"<dc:date>" not in first
        assert matplotlib.__version__.encode() not in first
    else:
        assert first.startswith(b"\x89PNG")


def test_notebooks_show_it():
    figure = draw("n c -> n", shape=(2, 3))
    assert "<svg" in figure._repr_svg_()


def test_settings_of_others_are_left_alone():
    code = (
        "import sys; from flexnorm.drawing import draw; assert 'matplotlib' not in sys.modules;"
        "import matplotlib as m; keys = set(m.rcParams) - {'backend'}; before = {key: m.rcParams[key] for key in keys};"
        "draw('n c -> n', shape=(2, 3))._repr_svg_(); assert {key: m.rcParams[key] for key in keys} == before;"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_without_matplotlib_one_line_says_what_to_install():
    code = (
        "import sys; sys.modules['matplotlib'] = None\nfrom flexnorm.drawing import draw\n"
        "try:\n    draw('n c -> n', shape=(2, 3))\nexcept ImportError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == 'flexnorm.drawing needs matplotlib: pip install "flexnorm[viz]"\n'


# --- errors ----------------------------------------------------------------------------------------------------------

ids = torch.tensor([0, 1])
ERRORS = [
    ((), {}, SpecError, "one pattern or several"),
    (("n c -> n",), {"shape": (2, 3), "path": "x.jpg"}, SpecError, "'x.svg'"),
    (("n c -> n",), {"shape": (2, 3), "path": "x"}, SpecError, "'x.svg'"),
    (("n c -> n",), {"shape": (2, 0)}, ShapeError, "without elements"),
    (("n c -> n",), {"shape": (2, 3, 4)}, ShapeError, "names every axis"),
    (("a b c d e f -> a",), {"shape": (1,) * 6}, ShapeError, "up to 5 axes"),
    (("... -> ",), {"shape": (2,) * 6}, ShapeError, "up to 5 axes"),
    (("n c -> n",), {"shape": (2**40, 2**40)}, ShapeError, "2^62"),
    (("n c, n -> c",), {"shape": (2**40, 3)}, ShapeError, "2^24"),
    (("n c -> n",), {"shape": "23"}, SpecError, "whole numbers"),
    (("n c -> n",), {"shape": (2, -3)}, SpecError, "whole numbers"),
    (("n c -> n",), {"shape": 6}, SpecError, "whole numbers"),
    (("n c > n",), {"shape": (2, 3)}, SpecError, "->"),
    ((3,), {"shape": (2, 3)}, SpecError, "a pattern is a string"),
    (("n (g c) -> n g",), {"shape": (2, 6)}, ShapeError, "g=1"),
    (("n c -> n",), {"shape": (2, 3), "q": 3}, SpecError, "'q' is no axis"),
    (("n c -> n",), {"shape": (2, 3), "sizes": {"(q c)": 3}}, SpecError, "no composition"),
    (("n c -> n", "n c -> c"), {"shape": (2, 3), "titles": ["one"]}, SpecError, "one text for every pattern"),
    (("n c -> n",), {"shape": (2, 3), "mask": ids.bool()}, SpecError, "does not say what its axes are"),
    (("v c -> g[v]",), {"shape": (3, 2), "g": ids}, ShapeError, "shape (3,)"),
    (("v c -> g[v]",), {"shape": (2, 2), "g": [0, 1]}, SpecError, "from_sizes"),
    (("v c -> g[v]",), {"shape": (2, 2), "g": 0}, SpecError, "tensor of ids"),
]


@pytest.mark.parametrize(("patterns", "kwargs", "error", "says"), ERRORS)
def test_errors_are_the_librarys_own(patterns, kwargs, error, says):
    with pytest.raises(error) as caught:
        draw(*patterns, **kwargs)
    assert says in str(caught.value)
    assert "instead:" in str(caught.value)


def test_a_folder_that_cannot_be_written_is_said_in_one_line(tmp_path):
    path = tmp_path / "none" / "x.svg"
    with pytest.raises(OSError, match="cannot be written: No such file or directory") as caught:
        draw("n c -> n", shape=(2, 3), path=path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
