"""Which ranks hold the same part of weights that are divided among some of them."""

from __future__ import annotations

from collections.abc import Sequence

from hesscope.errors import HesscopeError


def replicas(groups: Sequence[Sequence[int] | None], ours: Sequence[int], rank: int, probe_groups: int) -> list[int]:
    """Those that hold what `ours[rank]` holds, itself included; none where every rank has all weights.

    Args:
        groups: for each of our ranks, those among which its weights are divided; None for weights that are not.
        ours: our ranks, by their names outside.
        probe_groups: so many groups of ranks divide vectors.

    Raises:
        HesscopeError: groups that are not of one size, or do not have each of our ranks once; probe groups that are others.
    """
    whole = [r for r, group in enumerate(groups) if group is None]
    if len(whole) == len(groups):
        return []
    if whole:
        raise HesscopeError(
            f"Expected weights that are divided among the ranks, or whole on each, but rank {whole[0]} has all of them; make the "
            "same model on every rank."
        )
    found = sorted({tuple(group) for group in groups if group is not None})
    sizes = {len(group) for group in found}
    if sorted(r for group in found for r in group) != sorted(ours) or len(sizes) > 1:
        raise HesscopeError(
            f"Expected the weights to be divided among all {len(ours)} ranks of the group, or among each of several groups of one "
            f"size that have all of these, they are among {', '.join(map(str, map(list, found)))}; give hs.data_parallel the group "
            "of the device mesh."
        )
    size, copies = len(ours) // probe_groups, len(found)
    if probe_groups > 1 and found != [tuple(ours[start : start + size]) for start in range(0, len(ours), size)]:
        raise HesscopeError(
            f"Expected probe_groups to be the replicas of the divided weights, got {probe_groups} groups and {copies} "
            f"replica{'s' * (copies > 1)}: divide the weights on a mesh of {probe_groups} x {size} (replicas, shards; --layout hsdp), "
            "or leave the groups out."
        )
    mine = next(group for group in found if ours[rank] in group)
    return sorted(group[mine.index(ours[rank])] for group in found)
