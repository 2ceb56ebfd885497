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
"""Operators that fusion and quantization passes create or replace. Operators of the runtimes' domains are added."""


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
    "--pipeline", metavar="TEXT", shell_complete=complete_pipeline, help="For an .onnx file: the passes to run on it."
)
@click.option(
    "--preset",
    shell_complete=complete_presets,
    help="For an .onnx file: the preset to run on it; exact if neither is given.",
)
@click.option(
    "--target",
    shell_complete=complete_targets,
    help="Only this engine of an output; for an .onnx file, the target of the preset (onnxruntime if not given).",
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
    """Show the sites of SOURCE (an output, or an .onnx file) where each pass fired or refused, with reasons."""
    from planish.optimizer.driver.explain import explain
    from planish.optimizer.output.sites import Expectation, check_expectations, of_pass

    expectations = [Expectation.parse(text) for text in expect]
    rewritten_by_target = explain(source, pipeline=pipeline, preset=preset, target=target)
    sites = [record for rewritten in rewritten_by_target.values() for record in rewritten.sites]
    shown = sites if only is None else of_pass(sites, only)
    if as_json:
        operators = {name: {"canonical": r.operators, "shipped": r.shipped} for name, r in rewritten_by_target.items()}
        print_json({"passes": [asdict(record) for record in shown], "operators": operators})
    else:
        _print(source, shown, fired=only is not None)
        _print_products(source, only)
        if only is None:
            _print_operators(rewritten_by_target)
    for rewritten in rewritten_by_target.values():
        check_expectations(expectations, [rewritten])


def _print_operators(rewritten_by_target: Mapping[str, Rewritten]) -> None:
    """Counts of the operators that fusion creates or replaces, for each target: after the shared passes, and in the
    graph that the target compiles."""
    from planish.optimizer.cli.display import print_table

    counts = [count for rewritten in rewritten_by_target.values() for count in (rewritten.operators, rewritten.shipped)]
    names = [*CANONICAL, *sorted({name for count in counts for name in count if "::" in name})]
    rows = [(name, *(str(count.get(name, 0)) for count in counts)) for name in names]
    # Attention is shown with 0 as well: its absence is what most users look for.
    shown = [row for row in rows if row[0] == "Attention" or set(row[1:]) != {"0"}]
    columns = [f"{name}, {stage}" for name in rewritten_by_target for stage in ("canonical", "as compiled")]
    print_table("operators", ("operator", *columns), shown)


def _print(source: Path, sites_by_pass: Sequence[PassSites], *, fired: bool) -> None:
    from planish.optimizer.cli.display import print_table

    several = len({(sites.target, sites.component) for sites in sites_by_pass}) > 1
    rows = [
        (
            *((sites.target, sites.component) if several else ()),
            sites.text,
            str(len(sites.fired)),
            str(len(sites.refused)),
            str(len(sites.near_misses)),
            "" if sites.rolled_back is None else f"rolled back: {sites.rolled_back}",
        )
        for sites in sites_by_pass
    ]
    columns = (*(("target", "component") if several else ()), "pass", "fired", "refused", "near misses", "note")
    print_table(str(source), columns, rows)
    for sites in sites_by_pass:
        for site in sites.fired if fired else ():
            click.echo(f"{sites.name} fired at {site}")
        _print_refusals(sites)


def _print_products(source: Path, only: str | None) -> None:
    """The MatMuls of an output that quantization passes could quantize: a list for one pass, else their number."""
    from planish.optimizer.cli.display import print_table
    from planish.optimizer.output.lock import LOCK, Lock

    if not source.is_dir():
        return
    for target, choice in Lock.read(source / LOCK).targets.items():
        for component, text in dict.fromkeys((p.component, p.text) for p in choice.products):
            matmuls = [p for p in choice.products if (p.component, p.text) == (component, text)]
            total, quantized = sum(p.weights for p in matmuls), [p for p in matmuls if p.rounded]
            share = f"{sum(p.weights for p in quantized) / total:.0%} of their weights"
            title = f"{target}, {component}: {text} quantizes {len(quantized)} of {len(matmuls)} MatMuls, {share}"
            listed = matmuls if text.partition("{")[0] == only else []
            formats = {True: "quantized", False: "float"}
            rows = [
                (p.location, formats[p.rounded], _effect(p), f"{_decibels(p):.1f}", f"{p.weights / total:.1%}")
                for p in listed
            ]
            columns = ("MatMul", "format", "change of outputs", "signal over noise, dB", "share of weights")
            click.echo(title) if not rows else print_table(title, columns, rows)


def _effect(product: Product) -> str:
    return "not measured" if product.effect is None else f"{product.effect:.1e}"


def _decibels(product: Product) -> float:
    return math.inf if product.noise == 0 else -10 * math.log10(product.noise)


def _print_refusals(sites: PassSites) -> None:
    """Three lines for each reason: pass and node, PyTorch module, the value that differed; with the number of sites."""
    by_reason: dict[tuple[str, bool], list[Refusal]] = {}
    for refusal in sites.refusals:
        by_reason.setdefault((refusal.reason, refusal.near), []).append(refusal)
    for (reason, near), refusals in by_reason.items():
        node, _, module = refusals[0].site.partition(" in ")
        more = f" (and {len(refusals) - 1} more like it)" if len(refusals) > 1 else ""
        click.echo(f"\n{sites.name} {'nearly fired' if near else 'refused'} at {node}{more}")
        click.echo(f"  in module  {module or 'unknown: the file does not say'}")
        click.echo(f"  because    {reason}" + (f": {refusals[0].culprit}" if refusals[0].culprit else ""))
