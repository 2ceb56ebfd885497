"""`planish explain`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from planish.optimizer.cli.completion import complete_passes, complete_pipeline, complete_presets, complete_targets
from planish.optimizer.cli.options import existing, expect_option, json_flag, print_json

if TYPE_CHECKING:
    from planish.optimizer.interfaces.pass_base import Refusal
    from planish.optimizer.output.lock import Product
    from planish.optimizer.output.sites import PassSites, Rewritten

CANONICAL = (
    "Attention", "Softmax", "RotaryEmbedding", "LayerNormalization", "RMSNormalization", "Gelu", "Erf", "Tanh", "Gemm",
    "MatMul", "MatMulInteger", "QLinearMatMul", "Conv", "QuantizeLinear", "DynamicQuantizeLinear", "DequantizeLinear",
)  # fmt: skip
"""What fusions and quantization make, and what they replace; operators of runtimes' own domains are shown as well."""


@click.command("explain")
@click.argument("source", type=existing)
@click.option(
    "--pass",
    "only",
    metavar="NAME",
    shell_complete=complete_passes,
    help="Only this pass, and every site where it fired.",
)
@click.option(
    "--pipeline", metavar="TEXT", shell_complete=complete_pipeline, help="For an .onnx file: the passes to try on it."
)
@click.option(
    "--preset",
    shell_complete=complete_presets,
    help="For an .onnx file: a named pipeline to try on it; exact if neither is given.",
)
@click.option(
    "--target",
    shell_complete=complete_targets,
    help="Only this engine of an output; for an .onnx file, whose preset (onnxruntime).",
)
@expect_option
@json_flag
def command(
    source: Path,
    only: str | None,
    pipeline: str | None,
    preset: str | None,
    target: str | None,
    expect: tuple[str, ...],
    as_json: bool,
) -> None:
    """Say where each pass fired on SOURCE (an output, or an .onnx file), where it refused, and why."""
    from planish.optimizer.driver.explain import explain
    from planish.optimizer.output.sites import Expectation, check_expectations, of_pass

    wanted = [Expectation.parse(text) for text in expect]
    found = explain(source, pipeline=pipeline, preset=preset, target=target)
    sites = [record for rewritten in found.values() for record in rewritten.sites]
    shown = sites if only is None else of_pass(sites, only)
    if as_json:
        operators = {name: {"canonical": r.operators, "shipped": r.shipped} for name, r in found.items()}
        print_json({"passes": [asdict(record) for record in shown], "operators": operators})
    else:
        _print(source, shown, fired=only is not None)
        _print_products(source, only)
        if only is None:
            _print_operators(found)
    for rewritten in found.values():
        check_expectations(wanted, [rewritten])


def _print_operators(found: Mapping[str, Rewritten]) -> None:
    """How often each target has the operators that fusions make, and those that they replace: as passes left them, and
    in the graph that the target compiles."""
    from planish.optimizer.cli.display import print_table

    counts = [count for rewritten in found.values() for count in (rewritten.operators, rewritten.shipped)]
    names = [*CANONICAL, *sorted({name for count in counts for name in count if "::" in name})]
    rows = [(name, *(str(count.get(name, 0)) for count in counts)) for name in names]
    shown = [row for row in rows if row[0] == "Attention" or set(row[1:]) != {"0"}]
    columns = [f"{name}, {what}" for name in found for what in ("canonical", "as compiled")]
    print_table("operators", ("operator", *columns), shown)


def _print(source: Path, found: Sequence[PassSites], *, fired: bool) -> None:
    from planish.optimizer.cli.display import print_table

    several = len({(sites.target, sites.component) for sites in found}) > 1
    rows = [
        (
            *((sites.target, sites.component) if several else ()),
            sites.text,
            str(len(sites.fired)),
            str(len(sites.refused)),
            str(len(sites.near_misses)),
            "" if sites.rolled_back is None else f"undone: {sites.rolled_back}",
        )
        for sites in found
    ]
    columns = (*(("target", "component") if several else ()), "pass", "fired", "refused", "near misses", "note")
    print_table(str(source), columns, rows)
    for sites in found:
        for site in sites.fired if fired else ():
            click.echo(f"{sites.name} fired at {site}")
        _print_refusals(sites)


def _print_products(source: Path, only: str | None) -> None:
    """What quantizing passes of an output chose among: all of one pass, or how many and where the line was drawn."""
    from planish.optimizer.cli.display import print_table
    from planish.optimizer.output.lock import LOCK, Lock

    if not source.is_dir():
        return
    for target, choice in Lock.read(source / LOCK).targets.items():
        for component, text in dict.fromkeys((one.component, one.text) for one in choice.products):
            own = [one for one in choice.products if (one.component, one.text) == (component, text)]
            total, rounded = sum(one.weights for one in own), [one for one in own if one.rounded]
            share = f"{sum(one.weights for one in rounded) / total:.0%} of their weights"
            title = f"{target}, {component}: {text} rounds {len(rounded)} of {len(own)} products, {share}"
            listed = own if text.partition("{")[0] == only else []
            forms = {True: "rounded", False: "float"}
            rows = [
                (p.location, forms[p.rounded], _effect(p), f"{_decibels(p):.1f}", f"{p.weights / total:.1%}")
                for p in listed
            ]
            columns = ("product", "form", "moves the outputs by", "signal over noise, dB", "share of weights")
            click.echo(title) if not rows else print_table(title, columns, rows)


def _effect(product: Product) -> str:
    return "not measured" if product.effect is None else f"{product.effect:.1e}"


def _decibels(product: Product) -> float:
    return math.inf if product.noise == 0 else -10 * math.log10(product.noise)


def _print_refusals(sites: PassSites) -> None:
    """Three lines for each reason: which pass and node, in which module, what differed; then how many are alike."""
    alike: dict[tuple[str, bool], list[Refusal]] = {}
    for refusal in sites.refusals:
        alike.setdefault((refusal.reason, refusal.near), []).append(refusal)
    for (reason, near), refusals in alike.items():
        node, _, module = refusals[0].site.partition(" in ")
        more = f" (and {len(refusals) - 1} more like it)" if len(refusals) > 1 else ""
        click.echo(f"\n{sites.name} {'nearly fired' if near else 'refused'} at {node}{more}")
        click.echo(f"  in module  {module or 'unknown: the file does not say'}")
        click.echo(f"  because    {reason}" + (f": {refusals[0].culprit}" if refusals[0].culprit else ""))
