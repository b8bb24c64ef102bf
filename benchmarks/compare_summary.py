"""Tables of measured points: what docs/performance.md shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compare_contenders import REFERENCES
from compare_plans import is_preset
from compare_records import Record
from roofline import Rates, combined, thread_count

from gtr_deploy.runtime import UsageError
from gtr_deploy.runtime.files import atomic_path
from gtr_deploy.runtime.models.architecture import ARCHITECTURES

BASE_PLAN = "mar"

CACHED_BYTES = 64e6
"""Weights below this need not be read from memory in every call."""


@dataclass(frozen=True)
class Points:
    """The newest points of one machine and number of threads.

    Attributes:
        ran: those with a time, the mode ``calls`` before ``whole`` where a point has both.
        varied: likewise, of plans with AR steps of their own (compare_plans.py).
        refused: those that could not run.
        rates: the best that were measured there.
    """

    ran: Sequence[Record]
    refused: Sequence[Record]
    rates: Rates
    varied: Sequence[Record] = ()

    @classmethod
    def of(cls, records: Sequence[Record]) -> Points:
        """From :func:`~compare_records.latest`, for the threads of the last record.

        Raises:
            UsageError: there are none.
        """
        if not records:
            raise UsageError("no measured points; compare.py measure makes them")
        threads = records[-1]["threads"]
        own = [record for record in records if record["threads"] == threads]
        ran = sorted((record for record in own if "seconds" in record), key=lambda record: record["mode"])
        return cls(
            [record for record in ran if is_preset(record["plan"])],
            [record for record in own if "seconds" not in record],
            combined([Rates.from_json(record["rates"]) for record in own]),
            [record for record in ran if not is_preset(record["plan"])],
        )

    @classmethod
    def all(cls, records: Sequence[Record]) -> list[Points]:
        """One per number of threads, the most first that have a reference: plots and targets begin with those."""
        found = [cls.of([r for r in records if r["threads"] == n]) for n in sorted({r["threads"] for r in records})]
        if not found:
            raise UsageError("no measured points; compare.py measure makes them")
        # The largest model that has a reference decides: a small one is measured with any number of threads.
        with_reference = [(max(p.work(m) for m in p.models if p.reference(m)), p.rates.threads, p)
                          for p in found if any(p.reference(m) for m in p.models)]  # fmt: skip
        main = max(with_reference, key=lambda entry: entry[:2])[2] if with_reference else cls.of(records)
        return [main, *(p for p in found if p.rates.threads != main.rates.threads)]

    @property
    def threads(self) -> str:
        """Such as ``2 threads``."""
        return thread_count(self.rates.threads)

    def work(self, model: str) -> float:
        """FLOPs per image of the model's largest plan."""
        return max((r["flops"] / r["batch"] for r in self.ran if r["model"] == model), default=0.0)

    def find(
        self, model: str, plan: str, batch: int = 1, backend: str | None = None, precision: str | None = None
    ) -> list[Record]:
        """Points that fit, fastest first; of a contender that ran in both modes, the one of calls."""
        wanted = {"model": model, "plan": plan, "batch": batch, "backend": backend, "precision": precision}
        found: dict[tuple[str, str], Record] = {}
        for record in self.ran:
            if all(value is None or record[name] == value for name, value in wanted.items()):
                found.setdefault((record["backend"], record["precision"]), record)
        return sorted(found.values(), key=lambda record: record["seconds"])

    def reference(self, model: str, batch: int = 1) -> Record | None:
        """The original's ``mar`` plan, or the torch backend's."""
        for backend in REFERENCES:
            if found := self.find(model, BASE_PLAN, batch, backend, "fp32"):
                return found[0]
        return None

    @property
    def models(self) -> list[str]:
        """In order of size."""
        return sorted({record["model"] for record in self.ran}, key=self.work)

    def matrix_seconds(self, record: Record) -> float:
        """The plan's FLOPs at the machine's matrix rate."""
        return record["flops"] / self.rates.matrix

    def floor(self, record: Record) -> float | None:
        """Least seconds of all its calls, see roofline.py; None where the weights may well stay in a cache."""
        weights = record["weight_bytes"]
        if sum(weights.values()) < CACHED_BYTES:
            return None
        total = 0.0
        for backbone, head, calls in record["work"]:
            total += self.rates.floor(backbone, weights["backbone"])
            total += calls * self.rates.floor(head / calls, weights["head"])
        return total

    def ratio(self, record: Record) -> float | None:
        """How many times as fast per image as the reference at the same batch size, or else at batch 1."""
        reference = self.reference(record["model"], record["batch"]) or self.reference(record["model"])
        if reference is None:
            return None
        return (reference["seconds"] / reference["batch"]) / (record["seconds"] / record["batch"])


def host_share(record: Record) -> float:
    """Of the time outside engine calls."""
    return record["parts"]["host"] / record["seconds"]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def points_table(everything: Sequence[Points]) -> str:
    """One row per point and mode, models and plans in order of work."""
    rows = []
    pairs = [(points, record) for points in everything for record in points.ran]
    for owner, record in sorted(pairs, key=lambda pair: _order(*pair)):
        seconds, parts = record["seconds"], record["parts"]
        ratio, floor = owner.ratio(record), owner.floor(record)
        shares = " / ".join(f"{parts[part] / seconds:.1%}" for part in ("backbone", "head", "host"))
        rows.append(
            [
                record["model"],
                record["plan"],
                str(record["batch"]),
                f"{record['backend']} {record['precision']}",
                str(record["threads"]),
                record["mode"],
                f"{seconds / record['batch']:.3g}",
                "" if ratio is None else f"{ratio:.2f}",
                f"{record['flops'] / seconds / 1e9:.1f}",
                f"{record['cpu_seconds'] / record['batch']:.3g}" if "cpu_seconds" in record else "",
                shares,
                f"{seconds / owner.matrix_seconds(record):.2f}",
                "" if floor is None else f"{seconds / floor:.2f}",
            ]
        )
    columns = ["model", "plan", "batch", "backend", "threads", "mode"]
    columns += ["s per image", "times as fast", "GFLOP/s", "CPU s"]
    return table([*columns, "backbone / head / host", "time ÷ FLOPs at matrix rate", "time ÷ floor"], rows)


def _order(points: Points, record: Record) -> tuple[Any, ...]:
    known = ["mar-digits", *ARCHITECTURES]
    model = known.index(record["model"]) if record["model"] in known else len(known)
    work = record["flops"] / record["batch"]
    return model, -work, record["batch"], points.rates.threads, record["mode"], record["seconds"]


def refused_table(everything: Sequence[Points]) -> str:
    """What could not run, each contender once."""
    refused = [record for points in everything for record in points.refused]
    reasons = {(r["model"], r["backend"], r["precision"]): r["not_run"] for r in refused}
    rows = [[model, f"{backend} {precision}", why] for (model, backend, precision), why in reasons.items()]
    return table(["model", "backend", "not run"], rows) if rows else "Every contender ran."


def batch_table(everything: Sequence[Points]) -> str:
    """Cost per image and memory over batch sizes, for contenders with several."""
    groups: dict[tuple[str, str, str, str, int], list[Record]] = {}
    for record in [record for points in everything for record in points.ran]:
        name = (record["model"], record["plan"], record["backend"], record["precision"], record["threads"])
        sizes = groups.setdefault(name, [])
        if all(other["batch"] != record["batch"] for other in sizes):
            sizes.append(record)
    rows = []
    for (model, plan, backend, precision, threads), sizes in groups.items():
        if len(sizes) < 2:
            continue
        for record in sorted(sizes, key=lambda r: r["batch"]):
            peak = record["peak_bytes"]
            rows.append(
                [model, plan, f"{backend} {precision}", str(threads), str(record["batch"]),
                 f"{record['seconds'] / record['batch']:.3g}",
                 "" if peak is None else f"{peak / 1e6:.0f}"]
            )  # fmt: skip
    return table(["model", "plan", "backend", "threads", "batch", "s per image", "peak memory, MB"], rows)


def validation_table(everything: Sequence[Points]) -> str:
    """Calls mode against whole generations, where a point has both."""
    both: dict[tuple[Any, ...], dict[str, Record]] = {}
    for record in [record for points in everything for record in points.ran]:
        name = tuple(record[key] for key in ("model", "plan", "batch", "backend", "precision", "threads"))
        both.setdefault(name, {})[record["mode"]] = record
    rows = []
    for (model, plan, batch, backend, precision, threads), modes in both.items():
        if len(modes) == 2:
            cells = [model, plan, str(batch), f"{backend} {precision}", str(threads)]
            for name in ("seconds", "cpu_seconds"):
                whole, calls = modes["whole"].get(name), modes["calls"].get(name)
                known = whole is not None and calls is not None
                cells += [f"{whole:.3g}", f"{calls:.3g}", f"{calls / whole - 1:+.1%}"] if known else ["", "", ""]
            rows.append(cells)
    columns = ["model", "plan", "batch", "backend", "threads", "whole, s", "calls, s", "difference"]
    return table([*columns, "whole, CPU s", "calls, CPU s", "difference"], rows)


def machine_text(everything: Sequence[Points]) -> str:
    """What was measured where, and with which versions."""
    points, records = everything[0], [record for points in everything for record in points.ran]
    last = max(records, key=lambda record: record["date"])
    environment = last["environment"]
    versions = ", ".join(f"{name} {number}" for name, number in sorted(environment["versions"].items()))
    loads = [record["load_before"][0] for record in records if record["load_before"]]
    busy = f" Load average before a measurement: {min(loads):.1f} to {max(loads):.1f}." if loads else ""
    reference = next((r for m in points.models if (r := points.reference(m)) is not None), None)
    stands = "nothing: neither the original's code nor the torch backend ran with plan `mar`"
    if reference is not None:
        stands = "the original project's PyTorch code" if reference["backend"] == "original" else (
            "the torch backend in eager mode, which stands in for the original project's code"
        )  # fmt: skip
    days = sorted(record["date"][:10] for record in records)
    rates = "; ".join(points.rates.text for points in sorted(everything, key=lambda points: points.rates.threads))
    codes = ", ".join(dict.fromkeys(record["environment"]["code"] for record in records))
    return (
        f"{environment['machine']}; measured rates {rates}. {days[0]} to {days[-1]}. {versions}; "
        f"source {codes}.{busy} `times as fast` is against {stands}, plan `mar`, float32, "
        "with as many threads."
    )


def embed(path: Path, sections: dict[str, str]) -> None:
    """Replaces what stands between ``<!-- measured: NAME -->`` and ``<!-- end -->`` in a markdown file.

    Raises:
        UsageError: a marker is missing.
    """
    text = path.read_text(encoding="utf-8")
    for name, content in sections.items():
        start, end = f"<!-- measured: {name} -->", "<!-- end -->"
        before, found, rest = text.partition(start)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise UsageError(f"{path} has no place {start} ... {end}")
        text = f"{before}{start}\n\n{content}\n\n{end}{after}"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
