"""The command line: `flexnorm`, or `python -m flexnorm`."""

from __future__ import annotations

import functools
import math
import os
import platform
import shutil
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from ._version import __version__
from .axes import bind
from .calls.arguments import Formula, Options, label_names, sort_names
from .calls.functional import normalize
from .errors import ShapeError, SpecError, say
from .inspection import Explanation, explain
from .kernels import ROOMS
from .partition import Partition
from .spec import Expr, Lookup, Spec

try:
    import click
except ModuleNotFoundError:
    print('the command line of flexnorm needs click: pip install "flexnorm[cli]"', file=sys.stderr)
    raise SystemExit(2) from None

DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}
SOON = 2.0  # seconds that nobody minds waiting without a word


class Refusal(click.ClickException):
    """Bad input: the library's own text, on stderr."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        """Without click's "Error:" before it, so that carets stay under their pattern."""
        click.echo(self.message, err=True)


def refusing(command: Callable[..., None]) -> Callable[..., None]:
    """What the library refuses ends the command with its text and exit code 2."""

    @functools.wraps(command)
    def run(**kwargs: Any) -> None:
        try:
            command(**kwargs)
        except (SpecError, ShapeError) as error:
            raise Refusal(str(error)) from error

    return run


# --- what commands take ----------------------------------------------------------------------------------------------


def shape_of(text: str) -> tuple[int, ...]:
    """8,64,32,32 or 8x64x32x32; nothing is the shape of one number."""
    try:
        return _numbers(text)
    except ValueError:
        raise click.BadParameter(f"{text!r} is no shape; type 8,64,32,32, say") from None


def _numbers(text: str) -> tuple[int, ...]:
    sizes = text.strip("()[] ")
    return tuple(int(size) for size in sizes.replace("x", ",").split(",")) if sizes else ()


NAMES = """\b
NAME=VALUE are sizes of axes and labels:
  g=32          32 groups
  "(g c)=64"    the size of a composition
  band=2,3,4    a label: the sizes of its groups, in order"""


def takes(*, needed: bool = True, formula: bool = True) -> Callable[[Any], Any]:
    """The options that say what x is; with `formula`, those of `normalize` too."""
    options = [
        click.option("--shape", type=shape_of, required=needed, metavar="SIZES", help="Of x: 8,64,32,32."),
        click.option(
            "--lengths",
            type=shape_of,
            metavar="SIZES",
            help="A mask for a pattern that has one over two axes, as b t: the valid places of every row, 10,7,3.",
        ),
    ]
    if formula:
        options += [
            click.option("--affine", metavar="AXES", help='Of weight and bias: c, or "(g c)".'),
            click.option("--center/--no-center", default=True, help="Subtract the mean (default), or not: RMSNorm."),
            click.option(
                "--scale/--no-scale", default=True, help="Divide by the standard deviation (default), or not."
            ),
            click.option("--eps", type=float, default=1e-5, show_default=True, help="Added to the variance."),
            click.option("--activation", metavar="NAME", help="relu, silu or gelu."),
            click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32", show_default=True),
        ]

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _values(words: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """NAME=VALUE, as numbers by name."""
    found: dict[str, tuple[int, ...]] = {}
    for word in words:
        name, equals, value = word.partition("=")
        name = name.strip()
        try:
            if not equals or not name:
                raise ValueError
            numbers = _numbers(value)
        except ValueError:
            raise SpecError(say("a name has a value of whole numbers", received=repr(word), instead="g=32")) from None
        if name in found:
            raise SpecError(say(f"{name!r} is given once", received=repr(word), instead="leave one out"))
        found[name] = numbers
    return found


def _parsed(pattern: str, affine: str | None) -> tuple[Spec, Expr | None]:
    spec = Spec.parse(pattern)
    return spec, None if affine is None else spec.read(affine, "affine")


def _told(
    pattern: str, shape: tuple[int, ...] | None, values: Mapping[str, tuple[int, ...]], affine: str | None = None
) -> tuple[dict[str, int], dict[str, Partition]]:
    """The sizes of axes, and the labels, whose groups are told by their sizes."""
    spec, params = _parsed(pattern, affine)
    lookups = label_names(spec, params)
    sizes: dict[str, Any] = {}
    for name, numbers in values.items():
        if name not in lookups:
            if len(numbers) != 1:
                rule, received = "an axis has one size, and this is no label", f"{name}={','.join(map(str, numbers))}"
                raise SpecError(say(rule, text=spec.text, received=received, instead=f"{name}=8, say"))
            sizes[name] = numbers[0]
    sort_names(spec, [], sizes, None, {})
    labels = {}
    for name, (_, lookup) in lookups.items():
        if name in values:
            labels[name] = _label(spec, lookup, Partition.from_sizes(values[name]), shape, sizes)
    return sizes, labels


def _label(
    spec: Spec, lookup: Lookup, label: Partition, shape: tuple[int, ...] | None, sizes: Mapping[str, int]
) -> Partition:
    """Of several axes: its groups run through all of them, the last axis first."""
    if shape is None:
        return label
    over = bind(spec, shape, tuple(sizes.items())).shape_of(lookup.axes)
    whole = len(over) != 1 and math.prod(over) == label.ids.numel()
    return Partition(label.ids.view(over), label.count) if whole else label


def _mask(
    pattern: str, shape: tuple[int, ...] | None, lengths: tuple[int, ...] | None, sizes: Mapping[str, int]
) -> Tensor | None:
    if lengths is None:
        return None
    spec = Spec.parse(pattern)
    over = None if spec.mask is None or shape is None else bind(spec, shape, tuple(sizes.items()))
    axes = () if over is None or spec.mask is None else over.shape_of(spec.mask.elements)
    if len(axes) != 2 or axes[0] != len(lengths) or not all(0 <= length <= axes[1] for length in lengths):
        raise ShapeError(
            say(
                "lengths are those of a mask over two axes: one for every index of the first, up to the second's size",
                text=spec.text,
                received=f"lengths={','.join(map(str, lengths))}; mask of shape {axes}" if axes else "no mask",
                instead='"b t c, b t -> b" --shape 3,10,8 --lengths 10,7,3',
            )
        )
    return torch.arange(axes[1]) < torch.tensor(lengths)[:, None]


def _explained(pattern: str, names: Mapping[str, tuple[int, ...]], options: Mapping[str, Any]) -> Explanation:
    rest = dict(options)
    shape, lengths = rest.pop("shape"), rest.pop("lengths")
    sizes, labels = _told(pattern, shape, names, rest["affine"])
    for name, (expr, lookup) in label_names(*_parsed(pattern, rest["affine"])).items():
        if name not in labels:
            rule, instead = f"label {name!r} is read, and not given", f"{name}=2,3,4: the sizes of its groups"
            raise SpecError(expr.error(rule, lookup, instead=instead))
    rest["dtype"] = DTYPES[rest["dtype"]]
    mask = _mask(pattern, shape, lengths, sizes)
    return explain(pattern, shape, mask, sizes=sizes, labels=labels, **rest)


# --- commands --------------------------------------------------------------------------------------------------------


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="flexnorm")
def main() -> None:
    """Normalization of any kind of data: one line says which elements share statistics.

    A pattern names the axes of x, then those of the statistics: "n (g c) h w -> n g" is GroupNorm.

    \b
    flexnorm demo
    flexnorm explain "n (g c) h w -> n g" --shape 8,64,32,32 g=32
    flexnorm compare "n c h w -> n c" "n c h w -> n" --shape 8,64,32,32
    flexnorm draw "n c h w -> n c" "n c h w -> n" --shape 8,64,32,32 -o norms.svg

    Exit codes: 0 fine, 2 bad input.
    """


@main.command("explain", epilog=NAMES)
@click.argument("pattern")
@click.argument("names", nargs=-1, metavar="[NAME=VALUE]...")
@takes()
@refusing
def _explain(pattern: str, names: tuple[str, ...], **options: Any) -> None:
    """Say what PATTERN does to a tensor of this shape, before anything is computed.

    \b
    flexnorm explain "n (g c) h w -> n g" --shape 8,64,32,32 g=32
    flexnorm explain "b t (g c), b t -> b g" --shape 3,10,64 g=8 --lengths 10,7,3
    flexnorm explain "n c f t -> n c band[f]" --shape 8,1,9,100 band=2,3,4
    flexnorm explain "... c -> ..." --shape 8,512 --no-center --affine c
    """
    facts = list(_explained(pattern, _values(names), options).facts())
    wide = max(len(word) for word, _ in facts)
    for word, text in facts:
        click.echo(f"{click.style(f'{word:<{wide}}', bold=True)}  {text}")


@main.command(epilog=NAMES)
@click.argument("patterns", nargs=-1, required=True, metavar="PATTERN... [NAME=VALUE]...")
@click.option("-o", "--output", required=True, type=click.Path(), help="The file to write: .svg or .png.")
@click.option("--title", "titles", multiple=True, help="Of each pattern, in order.")
@takes(needed=False, formula=False)
@refusing
def draw(
    patterns: tuple[str, ...],
    output: str,
    titles: tuple[str, ...],
    shape: tuple[int, ...] | None,
    lengths: tuple[int, ...] | None,
) -> None:
    """Draw which elements share statistics: one PATTERN, or several side by side.

    \b
    flexnorm draw "n (g c) h w -> n g" --shape 8,64,32,32 g=32 -o group.svg
    flexnorm draw "n c h w -> n c" "n c h w -> n" --title Instance --title Layer -o norms.png
    """
    from .drawing import draw as drawn

    words = [word for word in patterns if "->" not in word and "=" in word]
    patterns = tuple(word for word in patterns if word not in words)
    if not patterns:
        raise SpecError(say("there is a pattern to draw", received=" ".join(words), instead='"n c h w -> n c"'))
    values = _values(words)
    sizes: dict[str, int] = {}
    labels: dict[str, Partition] = {}
    mask = None
    for pattern, own in zip(patterns, _shared(patterns, values), strict=True):
        told, found = _told(pattern, shape, own)
        sizes, labels = {**sizes, **told}, {**labels, **found}
        mask = _mask(pattern, shape, lengths, told) if Spec.parse(pattern).mask is not None else mask
    if lengths is not None and mask is None:
        _mask(patterns[0], shape, lengths, sizes)
    try:
        drawn(*patterns, shape=shape, mask=mask, labels=labels, sizes=sizes, titles=titles or None, path=output)
    except (ImportError, OSError) as error:
        raise Refusal(str(error)) from error
    click.echo(output)


def _shared(patterns: Sequence[str], values: Mapping[str, tuple[int, ...]]) -> list[dict[str, tuple[int, ...]]]:
    """What is told of several patterns: to each what it knows; what none knows, to all, so that one refuses it."""
    specs = [Spec.parse(pattern) for pattern in patterns]

    def known(spec: Spec, name: str) -> bool:
        return name in label_names(spec) or name in {a.name for a in spec.x.axes()} or _composed(spec, name)

    nobody = {name for name in values if not any(known(spec, name) for spec in specs)}
    return [{n: v for n, v in values.items() if n in nobody or known(spec, n)} for spec in specs]


def _composed(spec: Spec, name: str) -> bool:
    return spec.read_composition(name) is not None


@main.command(epilog=NAMES)
@click.argument("first", metavar="PATTERN")
@click.argument("second", metavar="PATTERN")
@click.argument("names", nargs=-1, metavar="[NAME=VALUE]...")
@takes()
@refusing
def compare(first: str, second: str, names: tuple[str, ...], **options: Any) -> None:
    """Explain two patterns side by side; a * marks what differs.

    \b
    flexnorm compare "n c h w -> n c" "n (g c) h w -> n g" --shape 8,64,32,32 g=8
    """
    told = _shared((first, second), _values(names))
    if options["lengths"] is not None and Spec.parse(first).mask is None and Spec.parse(second).mask is None:
        _mask(first, options["shape"], options["lengths"], {})
    sides = []
    for pattern, own in zip((first, second), told, strict=True):
        lengths = options["lengths"] if Spec.parse(pattern).mask is not None else None
        sides.append(dict(_explained(pattern, own, {**options, "lengths": lengths}).facts()))
    for line in _columns(*sides):
        click.echo(line)


def _columns(left: Mapping[str, str], right: Mapping[str, str]) -> Iterator[str]:
    words = list(dict.fromkeys([*left, *right]))
    wide = max(map(len, words))
    each = max(24, (min(shutil.get_terminal_size((140, 24)).columns, 180) - wide - 8) // 2)
    for word in words:
        texts = [side.get(word, "") for side in (left, right)]
        differs = texts[0] != texts[1]
        a, b = (textwrap.wrap(text, each, break_on_hyphens=False) or [""] for text in texts)
        for i in range(max(len(a), len(b))):
            head = f"{'*' if differs and i == 0 else ' '} {word if i == 0 else '':<{wide}}"
            one, two = (side[i] if i < len(side) else "" for side in (a, b))
            yield f"{click.style(head, bold=differs)}  {one:<{each}}  {two}".rstrip()


@main.command(epilog=NAMES)
@click.argument("pattern")
@click.argument("names", nargs=-1, metavar="[NAME=VALUE]...")
@takes()
@click.option(
    "--seconds", type=click.FloatRange(0.05, 600), default=4.0, show_default=True, help="How long to measure."
)
@refusing
def bench(pattern: str, names: tuple[str, ...], seconds: float, **options: Any) -> None:
    """Measure PATTERN on this machine, on random numbers.

    Forward, and forward with backward, in turns with x.clone() and with torch's own operation where there is an equal
    one. The ratios are medians over all turns.

    \b
    flexnorm bench "n (g c) h w -> n g" --shape 16,256,64,64 g=32
    """
    e = _explained(pattern, _values(names), options)
    _check_memory(e)
    sizes, labels = _told(pattern, e.shape, _values(names), options["affine"])
    mask = _mask(pattern, e.shape, options["lengths"], sizes)
    x = torch.randn(e.shape, dtype=e.dtype, requires_grad=True)
    rest = {k: v for k, v in options.items() if k not in ("shape", "lengths", "dtype")}
    for name, shape in e.parameters.items():
        rest[name] = torch.randn(shape, dtype=e.dtype, requires_grad=True)

    def ours() -> Tensor:
        return normalize(x, pattern, mask, sizes=sizes, labels=labels, **rest)

    peer = e.peer if not e.parameters and options["activation"] is None else None
    compared: dict[str, Callable[[], Tensor]] = {"normalize": ours}
    if peer is not None:
        compared[f"torch: {e.names[0]}"] = functools.partial(peer, x)
    calls: dict[str, Callable[[], Any]] = {"x.clone()": x.detach().clone}
    leaves, dy = [x, *(rest[name] for name in e.parameters)], torch.ones_like(x)
    for name, call in compared.items():
        calls[f"{name}, forward"] = functools.partial(_without_gradient, call)
        calls[f"{name}, forward and backward"] = functools.partial(_with_gradient, call, leaves, dy)
    times = _measured(calls, seconds)
    click.echo(f"{e.pattern}  {'x'.join(map(str, e.shape))} {str(e.dtype).removeprefix('torch.')}, {e.plan}")
    threads = torch.get_num_threads()
    turns = len(times["x.clone()"])
    click.echo(f"{threads} thread{'s' * (threads > 1)}, median of {turns} turn{'s' * (turns > 1)}\n")
    wide = max(map(len, calls))
    for name, taken in times.items():
        ratio = statistics.median(a / b for a, b in zip(taken, times["x.clone()"], strict=True))
        click.echo(f"{name:<{wide}}  {1e3 * statistics.median(taken):>10.3f} ms  {ratio:>7.2f} x clone")
    if peer is None:
        click.echo("\ntorch has no operation that is the same" + ", with parameters" * bool(e.parameters))


def _without_gradient(call: Callable[[], Tensor]) -> None:
    with torch.no_grad():
        call()


def _with_gradient(call: Callable[[], Tensor], leaves: Sequence[Tensor], dy: Tensor) -> None:
    torch.autograd.grad(call(), leaves, dy)


def _measured(calls: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
    """The times of all calls, turn by turn, so that what disturbs one disturbs all."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    waiting = click.progressbar(length=1000, label="measuring", file=sys.stderr) if seconds > SOON else nullcontext()
    with waiting as bar:
        shown = 0
        while shown < 1000:
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
            done = min(1000, int(1000 * (time.perf_counter() - began) / seconds))
            if bar is not None:
                bar.update(done - shown)
            shown = done
    return times


def _check_memory(e: Explanation) -> None:
    """x, its gradient, and what is computed of it: eight tensors of its size at most."""
    needed = 8 * math.prod(e.shape) * e.dtype.itemsize
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else needed
    if needed > there:
        received = f"x of shape {e.shape}, which would take {needed >> 30:,} GiB of {there >> 30:,} GiB"
        raise ShapeError(say("what is measured fits in memory", received=received, instead="a smaller shape"))


@main.command()
def demo() -> None:
    """Show in a few seconds what flexnorm is. No data is needed."""
    pattern = "b t (g c), b t -> b g"
    click.echo("Three recordings of 10, 7 and 3 frames with 8 features, padded to 10 frames, in one batch.")
    click.echo("GroupNorm with 2 groups is to pool over the frames of a recording, and never over padding:\n")
    click.echo(f'    y = normalize(x, "{pattern}", mask, g=2)\n')
    lengths = torch.tensor([10, 7, 3])
    mask = torch.arange(10) < lengths[:, None]
    x = torch.randn(3, 10, 8, generator=torch.Generator().manual_seed(0)) + 5
    click.echo(textwrap.indent(str(explain(pattern, x, mask, g=2)), "    "))
    y = normalize(x, pattern, mask, g=2)
    padded = x.where(mask[..., None], torch.nan)
    same = torch.equal(normalize(padded, pattern, mask, g=2), y)
    apart = [normalize(x[i : i + 1, :n], "b t (g c) -> b g", g=2)[0] for i, n in enumerate(lengths.tolist())]
    far = max(float((y[i, : len(alone)] - alone).abs().max()) for i, alone in enumerate(apart))
    blind = normalize(x.where(mask[..., None], 0.0), "b t (g c) -> b g", g=2)
    off = max(float((blind[i, : len(alone)] - alone).abs().max()) for i, alone in enumerate(apart))
    click.echo(f"\nEach recording alone, without padding: differs by {far:.1e} at most.")
    click.echo(f"NaN in all padding: the result is {'the same, bit by bit' if same else 'another'}.")
    click.echo(f"Without the mask, over zeros as padding, it would differ by {off:.1f}.")
    click.echo('\nGo on: flexnorm explain "n (g c) h w -> n g" --shape 8,64,32,32 g=32')


@main.command()
def env() -> None:
    """Print versions, and which kernels are available here, or why not."""
    lines = {"flexnorm": __version__, "python": platform.python_version(), "system": platform.platform()}
    packages = ("torch", "einops", "click", "matplotlib", "torch_geometric", "torchaudio", "opacus", "triton")
    lines.update({name: _version(name) for name in packages})
    for name, reason in _kernels().items():
        lines[f"kernel {name}"] = reason
    lines["threads"] = str(torch.get_num_threads())
    lines["CPU capability"] = torch.backends.cpu.get_cpu_capability()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    lines["GPU"] = ", ".join(gpus) or "none"
    wide = max(map(len, lines))
    for name, text in lines.items():
        click.echo(f"{name:<{wide}}  {text}")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _kernels() -> dict[str, str]:
    """Of every room whether it computes an RMSNorm here, which all of them know, or why not."""
    formula = Formula(Spec.parse("n c -> n"), Options(center=False), (), {})
    found = {}
    for name, room in ROOMS.items():
        device = "cuda" if name == "triton" and torch.cuda.is_available() else "cpu"
        recipe, operands = formula.prepare(torch.ones(2, 4, device=device), None, (), {})
        refusal = room.refusal(recipe, operands) if hasattr(room, "refusal") else None
        found[name] = "available" if refusal is None else f"not available: {refusal}"
    return found


if __name__ == "__main__":
    main(prog_name="flexnorm" if not sys.argv[0].endswith("__main__.py") else "python -m flexnorm")
