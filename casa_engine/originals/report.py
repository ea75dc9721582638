"""What `casa checkpoint inspect` prints: fields and tensors of an original, and what is open."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from casa_engine.originals.layer_names import split_layer
from casa_engine.originals.plan import Plan
from casa_engine.originals.proposals import groups, nearest

WIDTH = 60
# Kinds of tensors and fields that are shown at most; of a published model there are some dozens.
MAX_GROUPS = 500


def report(plan: Plan) -> Iterator[str]:
    """Yield the lines of the report."""
    snapshot = plan.snapshot
    num_bytes = sum(header.num_bytes for header in snapshot.tensors.values())
    dtypes = ", ".join(sorted({header.dtype for header in snapshot.tensors.values()}))
    yield (
        f"{snapshot.path}: family {plan.family}, {len(snapshot.tensors)} tensors of {dtypes}, "
        f"{num_bytes / 1e9:.3f} GB, fingerprint {snapshot.fingerprint[:16]}"
    )
    yield ""
    rows = [(one.name, _shown(one.value), one.origin, one.status.upper()) for one in plan.values.values()]
    yield from _table(("field", "value", "from", "status"), rows)
    yield ""
    yield from _table(("tensors there", "shape", "layers", "here", "status"), _tensor_rows(plan))
    assignment = plan.assignment
    unfilled = {name: plan.widest[name] for name in plan.unfilled()}
    if assignment.leftovers:
        yield from ("", "Tensors without a place (nearest of ours by shape and name):")
        ours = {one.pattern: one.shape for one in groups(unfilled)}
        for group in groups({name: snapshot.tensors[name].shape for name in assignment.leftovers})[:MAX_GROUPS]:
            shapes = {pattern: shape for pattern, shape in ours.items() if shape == group.shape}
            near = ", ".join(nearest(group.pattern, group.shape, shapes)) or "none of that shape"
            yield f"  {group.pattern} {group.shape}{_layers(group.layers)}: {near}"
    if assignment.missing:
        yield from ("", "Parameters that nothing fills:")
        for group in groups({name: plan.widest[name] for name in assignment.missing}):
            yield f"  {group.pattern} {group.shape}{_layers(group.layers)}"
    if assignment.problems:
        yield from ("", "Tensors that do not fit:", *(f"  {problem}" for problem in assignment.problems))
    if plan.misunderstood:
        yield from ("", "Fields that are not understood:", *(f"  {sentence}" for sentence in plan.misunderstood))
    if plan.unread:
        yield from ("", "Fields that nothing reads:")
        yield from (f"  {_shown(path)} = {_shown(value)}" for path, value in plan.unread)
    yield ""
    yield f"{len(plan.open_values)} fields are OPEN: {', '.join(value.name for value in plan.open_values) or 'none'}."


def caveats(plan: Plan) -> Iterator[str]:
    """Yield what is to be said wherever an original is taken over: a line for each thing that nobody is sure of."""
    yield from (f"MAP {path}" for path in plan.maps)
    for kind, values in (("OPEN", plan.open_values), ("UNVERIFIED", plan.unverified_values)):
        yield from (f"{kind} {one.name} = {_shown(one.value)}: {one.origin}" for one in values)
    if plan.unverified_tensors:
        yield f"UNVERIFIED names of {len(plan.unverified_tensors)} of {len(plan.snapshot.tensors)} tensors"
    yield from (f"UNREAD {_shown(path)} = {_shown(value)}" for path, value in plan.unread[:MAX_GROUPS])


def proposals_as_map(plan: Plan) -> str:
    """Return the proposals as a map file, for its reader to check."""
    lines = [
        f"# Proposed for {plan.snapshot.path}, fingerprint {plan.snapshot.fingerprint[:16]}, by shape and name alone.",
        "# Check every line, correct it here or in a second map file, and pass both: --map THIS --map OTHER.",
    ]
    return "\n".join([*lines, *dict.fromkeys(f"{rule.source} -> {rule.target}" for rule in plan.proposals)]) + "\n"


def _tensor_rows(plan: Plan) -> list[tuple[str, ...]]:
    rows: dict[tuple[str, ...], set[int]] = defaultdict(set)
    for name, parts in plan.assignment.parts.items():
        pattern, layer = split_layer(name)
        ours = " + ".join(split_layer(part.name)[0] for part in parts) or "left out"
        shape, status = plan.snapshot.tensors[name].shape, plan.assignment.rules[name].status
        rows[pattern, str(shape), ours, status.upper()].update(() if layer is None else (layer,))
    return [(there, shape, _span(layers), here, status) for (there, shape, here, status), layers in rows.items()]


def _span(layers: Iterable[int]) -> str:
    ordered = sorted(layers)
    if not ordered:
        return ""
    whole = ordered[-1] - ordered[0] + 1 == len(ordered)
    return f"{ordered[0]}-{ordered[-1]}" if whole else ",".join(map(str, ordered))


def _layers(layers: Iterable[int]) -> str:
    return f" in layers {_span(layers)}" if layers else ""


def _shown(value: Any) -> str:
    text = str(value)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 3]}..."


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for row in (head, *rows):
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
