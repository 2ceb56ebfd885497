"""What became of every site: where each pass fired, where it refused and why, and what it nearly was.

An output keeps these records in `sites.json`, so that `planish explain` needs neither the source nor the passes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from planish.optimizer import registry
from planish.optimizer.base import Refusal
from planish.optimizer.errors import BadInput, CheckFailed, UsageError
from planish.optimizer.manifest import Manifest, RolledBack
from planish.optimizer.pipeline import PassReport
from planish.optimizer.spec import did_you_mean

SITES = "sites.json"


@dataclass(frozen=True)
class PassSites:
    """The sites of one pass in one component of one target."""

    target: str
    component: str
    text: str
    """The pass with its options."""
    fired: Sequence[str]
    """Where it rewrote: operator, name and, where it is known, module of each node."""
    refusals: Sequence[Refusal]
    """Where it did not: refusals, and near misses."""
    rolled_back: str | None = None
    """Why all of it was undone."""

    @classmethod
    def of(cls, target: str, component: str, report: PassReport) -> PassSites:
        """The sites of a pass report."""
        return cls(target, component, report.text, tuple(report.sites), tuple(report.refusals), report.rolled_back)

    @classmethod
    def undone(cls, target: str, record: RolledBack) -> PassSites:
        """A pass of which nothing is left, as the manifest has it."""
        return cls(target, record.component, record.text, (), (), record.reason)

    @property
    def name(self) -> str:
        """The name of the pass."""
        return self.text.partition("{")[0]

    @property
    def refused(self) -> list[Refusal]:
        """Where the pattern stood and something was in the way."""
        return [refusal for refusal in self.refusals if not refusal.near]

    @property
    def near_misses(self) -> list[Refusal]:
        """Where only the heart of the pattern stood."""
        return [refusal for refusal in self.refusals if refusal.near]


_RECORDS = TypeAdapter(list[PassSites])


def write_sites(folder: Path, found: Sequence[PassSites]) -> None:
    """Write `sites.json`: of the passes whose work is in the engines, for a build from a lock has no others."""
    kept = [sites for sites in found if sites.rolled_back is None]
    (folder / SITES).write_bytes(_RECORDS.dump_json(kept, indent=1) + b"\n")


def of_pass(found: Sequence[PassSites], name: str) -> list[PassSites]:
    """The sites of one pass; UsageError if it is in no pipeline."""
    names = list(dict.fromkeys(sites.name for sites in found))
    if name not in names:
        raise UsageError(f"{name!r} is in no pipeline here{did_you_mean(name, names)}", where="--pass")
    return [sites for sites in found if sites.name == name]


def read_sites(folder: Path) -> list[PassSites]:
    """What `sites.json` of an output holds, and the passes that were undone; BadInput if it is no such output."""
    path, manifest = folder / SITES, Manifest.read(folder)
    if not path.is_file():
        raise BadInput(f"there is no {SITES}", where=folder, advice="build it again with this version")
    try:
        kept = _RECORDS.validate_json(path.read_bytes())
    except ValidationError as error:
        raise BadInput(
            f"cannot be read: {error.errors()[0]['msg']}", where=path, advice="build it again with this version"
        ) from None
    return [*kept, *(PassSites.undone(name, one) for name, t in manifest.targets.items() for one in t.rolled_back)]


@dataclass(frozen=True)
class Expectation:
    """How often a pass must fire: `fuse-attention=12`, over all components of a target."""

    name: str
    count: int

    @classmethod
    def parse(cls, text: str) -> Expectation:
        """Read `PASS=N`; UsageError if it is something else, or there is no such pass."""
        name, _, count = (part.strip() for part in text.partition("="))
        if not name or not count.isdigit():
            raise UsageError(f"cannot read the expectation {text!r}", advice="write --expect fuse-attention=12")
        registry.pass_class(name)
        return cls(name, int(count))

    def check(self, found: Iterable[PassSites]) -> None:
        """CheckFailed if the pass fired more or less often than expected; it names the first site that did not."""
        own = [sites for sites in found if sites.name == self.name]
        fired = sum(len(sites.fired) for sites in own if sites.rolled_back is None)
        if fired == self.count:
            return
        refusals = [refusal for sites in own for refusal in sites.refusals]
        undone = [f"it was undone: {sites.rolled_back}" for sites in own if sites.rolled_back is not None]
        reasons = undone or [f"{refusal.site}: {refusal.reason} ({refusal.culprit})" for refusal in refusals[:1]]
        why = "" if own else "; no pipeline has that pass"
        raise CheckFailed(
            f"{self.name} fired at {fired} sites, {self.count} were expected{why}" + "".join(f"; {r}" for r in reasons),
            advice="planish explain lists every site",
        )


def check_expectations(wanted: Sequence[Expectation], found: Sequence[PassSites], targets: Iterable[str]) -> None:
    """Hold every expectation against every target, one without passes too; CheckFailed names the first that fails."""
    for target in targets:
        for expectation in wanted:
            expectation.check([sites for sites in found if sites.target == target])
