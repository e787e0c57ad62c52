"""Is a resumed run the same run? Compares its data and its optimizers with the checkpoint's."""

from collections.abc import Mapping, Sequence
from typing import Any

from supple.core.spec import Change, SpecError


def data_identity(dataset: Any) -> dict[str, Any]:
    """Return what identifies a dataset: its size in samples (of iterable shards: their number), and
    its `fingerprint` or `_fingerprint`, as a text, if it has one."""
    try:
        size = len(dataset)
    except TypeError:  # one iterable
        size = 1
    found = getattr(dataset, "fingerprint", None) or getattr(dataset, "_fingerprint", None)
    return {"size": size, "fingerprint": found if isinstance(found, str) else None}


def changes(
    before: Mapping[str, Any], now: Mapping[str, Any], allowed: Sequence[Change]
) -> set[Change]:
    """Return what has changed since the checkpoint: `before` and `now` have "data" (see
    `data_identity`) and "optimizers", names of classes. Entries that the checkpoint lacks count as
    unchanged. Raises `SpecError` for a change that is not allowed."""
    found: dict[Change, str] = {}
    data, optimizers = before.get("data"), before.get("optimizers")
    if data is not None and data["size"] != now["data"]["size"]:
        found["data"] = f"the dataset had {data['size']:,} samples, and has {now['data']['size']:,}"
    elif data is not None and _is_other_print(data["fingerprint"], now["data"]["fingerprint"]):
        found["data"] = "the dataset has another fingerprint"
    if optimizers is not None and list(optimizers) != list(now["optimizers"]):
        then, here = " and ".join(optimizers), " and ".join(now["optimizers"])
        found["optimizer"] = f"the optimizer was {then}, and is {here}"
    consequences = {
        "data": "samples would be used twice, or never: this epoch begins anew with",
        "optimizer": "what it has learned of the gradients is lost: its state begins anew with",
    }
    for change, what in found.items():
        if change not in allowed:
            raise SpecError(f"{what}; {consequences[change]} --allow-changes {change}")
    return set(found)


def _is_other_print(before: str | None, now: str | None) -> bool:
    return before is not None and now is not None and before != now
