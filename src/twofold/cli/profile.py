"""`twofold adapt --profile` and `--encoder-mask auto`: what opening each encoder layer costs, shown and kept."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from rich.progress import track
from rich.table import Table

from twofold.adapt import adapt
from twofold.adapt.adaptation import DepthChooser, Profiler
from twofold.adapt.depth import Round, choose_decoder_layers
from twofold.adapt.profile import Opened, Profile, profile_encoder
from twofold.cli.console import err, note, out
from twofold.config.data import SourceConfig
from twofold.data.sources import SourceReader, parse_record

ENOUGH_DOCUMENTS = 200
"""Read of each domain; a profile takes the first that are long enough."""


Domains = Mapping[str, Sequence[str]]
"""Documents by the name of their domain."""


def read_domains(texts: Sequence[str]) -> Domains | None:
    """Documents of each domain.

    Args:
        texts: `name=path` or a path for each domain.

    Returns:
        None where none is given: the texts that are on every machine.

    Raises:
        ValueError: two domains of one name, or a file without text.
        FileNotFoundError: no such file.
    """
    domains: dict[str, list[str]] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals:
            name, path = Path(text).name.partition(".")[0], text
        if name in domains:
            raise ValueError(f"--profile-text gives two domains the name {name!r}; name them: NAME=PATH")
        config = SourceConfig(path=path)
        records = (parse_record(raw, config) for raw in SourceReader(config))
        domains[name] = [record["text"] for record, _ in zip(records, range(ENOUGH_DOCUMENTS), strict=False)]
    return domains or None


def profiler(domains: Domains | None, budget: float, *, each_layer: bool) -> Profiler:
    """A profile over the given domains, with a progress bar."""
    return partial(profile_encoder, texts=domains, budget=budget, each_layer=each_layer, watch=_with_progress)


def depth_chooser(domains: Domains | None) -> DepthChooser:
    """The choice of decoder layers over the given domains, with a progress bar."""

    def watch(rounds: Iterator[Round], total: int) -> Iterator[Round]:
        yield from track(rounds, description="taking layers out", total=total, console=err, transient=True)

    return partial(choose_decoder_layers, texts=domains, watch=watch)


def profile_donor(donor: str, folder: Path, profile: Profiler, *, overwrite: bool) -> Profile:
    """Profile a donor's balanced lossless pair; writes profile.json and, with matplotlib, profile.png.

    Raises:
        FileExistsError: `folder` has one of the two already, and `overwrite` is off.
        ValueError, FileNotFoundError: as for `twofold.adapt`.
    """
    files = folder / "profile.json", folder / "profile.png"
    there = [str(file) for file in files if file.exists()]
    if there and not overwrite:
        raise FileExistsError(f"{' and '.join(there)} exist; pass --overwrite, or give another folder")
    found = profile(adapt(donor, start="lossless"))
    folder.mkdir(parents=True, exist_ok=True)
    files[0].write_text(json.dumps({"donor": donor, **found.as_json()}, indent=1) + "\n")
    try:
        plot(found, files[1], Path(donor).name)
    except ModuleNotFoundError:
        warnings.warn(f"no {files[1]}: matplotlib is missing; pip install 'twofold[plot]'", stacklevel=2)
    return found


def show(profile: Profile) -> None:
    """A table: each layer alone, then layers together."""
    table = Table(
        "layers", *profile.loss, "opened", title=f"nats per token added by opening to '{profile.mask}'"
    )
    chosen = profile.chosen

    def add(label: str, opened: Opened, last: str) -> None:
        table.add_row(label, *_cells(opened), last)

    for opened in profile.alone:
        (layer,) = opened.layers
        add(str(layer), opened, "yes" if layer in chosen.layers else "")
    table.add_section()
    for opened in profile.together:
        add(f"{len(opened.layers)} cheapest", opened, "chosen" if opened == chosen else "")
    add(
        f"all, later tokens at {profile.faint.future_weight:g}",
        profile.faint,
        "chosen" if profile.faint == chosen else "",
    )
    out.print(table)
    losses = ", ".join(f"{name} {loss:.3f}" for name, loss in profile.loss.items())
    note(
        f"the donor's loss: {losses} nats per token. {len(chosen.layers)} of {len(profile.whole.layers)} layers can be "
        f"open, later tokens at weight {chosen.future_weight:g}, within {profile.budget} nats on every domain"
    )


def _cells(opened: Opened) -> list[str]:
    return [f"{opened.cost[name]:+.4f} ± {opened.noise[name]:.4f}" for name in opened.cost]


def plot(profile: Profile, path: Path, title: str) -> None:
    """The table as a picture.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (single, joint) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name in profile.loss:
        layers = range(len(profile.alone))
        noise = [opened.noise[name] for opened in profile.alone]
        single.errorbar(
            layers, [opened.cost[name] for opened in profile.alone], noise, fmt="o-", ms=3, label=name
        )
        counts = [len(opened.layers) for opened in profile.together]
        noise = [opened.noise[name] for opened in profile.together]
        joint.errorbar(
            counts, [opened.cost[name] for opened in profile.together], noise, fmt="o-", ms=3, label=name
        )
        faint = profile.faint.cost[name], profile.faint.noise[name]
        joint.errorbar(
            [len(profile.faint.layers)], *faint, fmt="s", mfc="none", label=f"{name}, later tokens at a tenth"
        )
    single.set(xlabel="layer opened alone", ylabel="nats per token above the donor", title=title)
    joint.axhline(profile.budget, color="gray", linestyle="--", label="budget")
    joint.axvline(len(profile.chosen.layers), color="gray", linestyle=":")
    joint.set(
        xlabel="layers open together, cheapest first",
        title=f"chosen: {len(profile.chosen.layers)} layers, later tokens at {profile.chosen.future_weight:g}",
    )
    for axes in (single, joint):
        axes.axhline(0, color="black", linewidth=0.5)
        axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _with_progress(steps: Iterator[Opened], total: int) -> Iterator[Opened]:
    yield from track(steps, description="opening layer by layer", total=total, console=err, transient=True)
