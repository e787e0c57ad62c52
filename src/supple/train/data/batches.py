"""`Batches`: the arguments of `job.batches`, validated, and the loader that they make."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from supple.core.spec import BatchMode, SpecError, is_count
from supple.train.data.loader import Loader, make_loader
from supple.train.data.map_loader import MapLoader
from supple.train.data.options import DataOptions, check_options, given


@dataclass(frozen=True, slots=True, kw_only=True)
class Batches:
    """The arguments of `job.batches`; make it with `of`."""

    dataset: Any
    batch_size: int
    """Samples of the global batch; 0 with a batch sampler whose first epoch was not listed yet,
    then the mean of that."""
    epochs: int
    shuffle: bool
    collate_fn: Callable[[list[Any]], Any] | None
    num_loader_processes: int
    micro_batch_size: int | None
    options: DataOptions = field(default_factory=DataOptions)

    @staticmethod
    def of(
        dataset: Any,
        *,
        batch_size: int | None,
        epochs: int,
        shuffle: bool | None,
        collate_fn: Callable[[list[Any]], Any] | None,
        num_workers: int,
        micro_batch_size: int | None,
        options: DataOptions,
    ) -> "Batches":
        """Return the arguments. Raises `SpecError` for those that exclude one another or cannot be
        honoured; those that depend on the data are checked by `loader`."""
        chosen = given(options)
        check_options(chosen, batch_size=batch_size, shuffle=shuffle, num_workers=num_workers)
        in_order = "sampler" in chosen or "weights" in chosen or "batch_sampler" in chosen
        return Batches(
            dataset=dataset,
            batch_size=0 if batch_size is None else batch_size,
            epochs=epochs,
            shuffle=not in_order if shuffle is None else shuffle,
            collate_fn=collate_fn,
            num_loader_processes=num_workers,
            micro_batch_size=micro_batch_size,
            options=chosen,
        )

    @property
    def has_batch_sampler(self) -> bool:
        return "batch_sampler" in self.options

    def is_like(self, other: "Batches") -> bool:
        """Whether two calls of `job.batches` were given the same objects and sizes."""
        options, others = dict(self.options), dict(other.options)
        same_options = options.keys() == others.keys() and all(
            value is others[name] or (isinstance(value, bool | int | str) and value == others[name])
            for name, value in options.items()
        )
        sizes = replace(self, dataset=None, options={}, batch_size=0)
        return (
            same_options
            and self.dataset is other.dataset
            and (self.has_batch_sampler or self.batch_size == other.batch_size)
            and sizes == replace(other, dataset=None, options={}, batch_size=0)
        )

    def sized(self, loader: Loader) -> "Batches":
        """Return the arguments with the batch size that `loader` has found, if none was given."""
        if self.batch_size or not isinstance(loader, MapLoader):
            return self
        return replace(self, batch_size=loader.mean_batch_size)

    def loader(self, seed: int, *, to_measure: bool = False) -> Loader:
        """Return a loader for these arguments. Raises `SpecError` unless sizes are whole numbers
        from 1, and for data that cannot be cut into batches.

        `to_measure`: batches may have any size, and nothing is dropped.
        """
        self._check_sizes()
        return make_loader(
            self.dataset,
            epochs=self.epochs,
            shuffle=self.shuffle,
            seed=seed,
            collate_fn=self.collate_fn,
            num_loader_processes=self.num_loader_processes,
            options=self.options,
            batch_size=self.batch_size,
            is_whole=self.micro_batch_size is None and not to_measure,
            to_measure=to_measure,
        )

    def _check_sizes(self) -> None:
        sizes = {"batch_size": self.batch_size, "epochs": self.epochs}
        if self.has_batch_sampler:
            del sizes["batch_size"]
        if self.micro_batch_size is not None:
            sizes["micro_batch_size"] = self.micro_batch_size
        wrong = [name for name, number in sizes.items() if not is_count(number)]
        if wrong:
            options = ", ".join(f"{name}={number!r}" for name, number in sizes.items())
            raise SpecError(
                f"job.batches({options}): {' and '.join(wrong)} must be a whole number of at least "
                "1, since training takes whole samples, and all of them once in every epoch. "
                "Change it in the script."
            )


def refuse_adaptive(batches: Batches, mode: BatchMode) -> None:
    """Raise `SpecError` if a batch sampler decides the batches, and `--batch adaptive` would."""
    if batches.has_batch_sampler and mode == "adaptive":
        raise SpecError(
            "job.batches(batch_sampler=...) with --batch adaptive: both decide the size of a "
            "global batch. Train with --batch fixed, or give a sampler and a batch_size."
        )
