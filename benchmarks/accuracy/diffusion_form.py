"""Seconds to make a batch of images or videos with a diffusion transformer that nobody has run.

One denoising step of b items of t tokens, with and without the prompt (guidance), on n devices that
split the sequence, u by heads (Ulysses) and r in a ring:

    arithmetic   2 b (2 P t) / (n F) + 2 b (4 t^2 h L) / (n F')
    launches     host + L launch
    exchange     L (r latency + m ((u-1)/(u W) + (r-1)/W')),  m = 16 b t h bytes / n
    step         (launches^4 + arithmetic^4)^(1/4) + exchange
    batch        steps * step + a fixed part + b pixels to decode

Of its message m (of queries, keys, values and outputs, two bytes each, twice for guidance) a device
sends all but its own share once among the heads; in a ring what each holds goes round to the r-1
others. On one device nothing is exchanged.
A token stands for 16 x 16 pixels, of a video for four frames too, unless it is given. A device
of ten times the peak F reaches a smaller share of it: the share falls as a power of F. Layers and
width follow from the parameters: L = 30 (P / 1e9)^0.1, P = 18 L h^2. Operations: Peebles and Xie
2023 (DiT); exchange: Jacobs et al. 2023 (Ulysses), Liu et al. 2023 (ring attention). Parameters are
positive and fitted as logarithms, with priors from data sheets.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from supple.core.fitting.estimates import IMPOSSIBLE, contradiction
from supple.core.fitting.grouped_fit import GroupedFit, fit_groups, unfitted
from supple.core.fitting.repeats import measured_estimate
from supple.core.layouts.model import Device
from supple.core.spec import check_counts, is_positive
from supple.core.types import Estimate
from supple.core.words import in_digits

_Array = npt.NDArray[np.float64]

# Centre and standard deviation of the logarithm.
_PRIORS: dict[str, tuple[float, float]] = {
    "arithmetic": (0.5, 0.3),  # of the peak
    "attention": (0.4, 0.4),  # of the peak
    "fill": (0.4, 0.7),  # exponent: a faster device reaches a smaller share of its peak
    "host": (5e-3, 0.7),  # s
    "launch": (2e-4, 0.5),  # s per layer
    "latency": (5e-5, 0.7),  # s per layer, of an exchange
    "heads": (2.5e-12, 0.7),  # s per byte
    "ring": (2.5e-12, 0.7),  # s per byte
    "fixed": (0.1, 0.7),  # s
    "decode": (5e-8, 1.0),  # s per pixel
}
_SPREADS = np.array([spread for _, spread in _PRIORS.values()])
_SCATTER = 0.2
"""Of one row's logarithm. Rows of one family are wrong together, so each counts for less than its
own scatter of 0.2 would say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffusionRun:
    """One batch on one copy of a model; `ulysses_degree * ring_degree` devices."""

    family: str
    """Variants of one base model share it: they are wrong together."""
    num_parameters: float
    device: Device
    ulysses_degree: int
    ring_degree: int
    batch_size: int
    num_pixels: int
    """Of one frame."""
    num_frames: int
    num_steps: int
    """Denoising steps."""
    num_tokens: float | None = None
    """None: a token stands for 16 x 16 pixels, of a video for four frames too."""

    def __post_init__(self) -> None:
        check_counts(
            "a diffusion run was asked for",
            ulysses_degree=self.ulysses_degree,
            ring_degree=self.ring_degree,
            batch_size=self.batch_size,
            num_pixels=self.num_pixels,
            num_frames=self.num_frames,
            num_steps=self.num_steps,
        )
        for what, size in (
            ("num_parameters", self.num_parameters),
            ("num_tokens", self.num_tokens),
        ):
            if size is not None and not is_positive(size):
                raise ValueError(
                    f"a diffusion run was asked for with {what}={size:g}: it must be positive and "
                    "finite. Correct the number."
                )

    @property
    def tokens(self) -> float:
        if self.num_tokens is not None:
            return self.num_tokens
        return self.num_pixels / 256.0 * math.ceil((self.num_frames + 3) / 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffusionMeasurement:
    run: DiffusionRun
    batch_s: float


@dataclass(frozen=True, slots=True)
class DiffusionModel:
    """A fit: predictions for any run. Make it with `fit_diffusion`."""

    _fit: GroupedFit
    measured: tuple[DiffusionMeasurement, ...] = ()

    def predict(self, run: DiffusionRun) -> Estimate:
        """Seconds of the batch; of a run that was measured as measured."""
        seen = [m.batch_s for m in self.measured if m.run == run]
        if seen:
            return measured_estimate(seen)
        log, half = self._fit.predict(lambda x: _logs(x, [run]), [run.family], [run.device.name])
        return Estimate(
            value=math.exp(log[0, 0]),
            low=math.exp(log[0, 0] - half[0, 0]),
            high=math.exp(log[0, 0] + half[0, 0]),
            source=self._fit.source,
        )


def fit_diffusion(measurements: Sequence[DiffusionMeasurement]) -> DiffusionModel:
    """Fit to measurements of any models; without any, the priors alone. Raises `ValueError` for a
    time that is not a positive number, and for two of one run that contradict each other."""
    for m in measurements:
        if not 0 < m.batch_s < math.inf:
            raise ValueError(
                f"a batch was measured at {m.batch_s} s: a positive number is needed. Leave it out."
            )
    found = contradiction((m.run, m.batch_s) for m in measurements)
    if found is not None:
        run, one, other = found
        assert isinstance(run, DiffusionRun)
        raise ValueError(
            f"a batch of {run.batch_size} of {run.family} on {run.device.name} was measured at "
            f"{in_digits(one)} and at {in_digits(other)} s: measurements of one run differ by less "
            f"than {IMPOSSIBLE:g} times. Check the units, and leave the wrong one out."
        )
    if not measurements:
        return DiffusionModel(unfitted(_SPREADS, 1))
    runs = [m.run for m in measurements]
    true = np.log([[m.batch_s for m in measurements]])
    families, devices = [run.family for run in runs], [run.device.name for run in runs]
    fit = fit_groups(lambda x: _logs(x, runs), true, families, devices, _SPREADS, (_SCATTER,))
    return DiffusionModel(fit, tuple(measurements))


def _logs(x: _Array, runs: Sequence[DiffusionRun]) -> _Array:
    """Logarithms of the batch's seconds, (vectors, 1, runs)."""
    p = {
        name: centre * np.exp(x[:, [index]])
        for index, (name, (centre, _)) in enumerate(_PRIORS.items())
    }
    parameters = np.array([run.num_parameters for run in runs])
    tokens = np.array([run.tokens for run in runs])
    batch = np.array([float(run.batch_size) for run in runs])
    heads = np.array([float(run.ulysses_degree) for run in runs])
    ring = np.array([float(run.ring_degree) for run in runs])
    pixels = np.array([float(run.num_pixels * run.num_frames) for run in runs])
    steps = np.array([float(run.num_steps) for run in runs])
    devices = heads * ring
    rate = np.array([run.device.flops_per_s for run in runs])
    peak = devices * rate * (1e15 / rate) ** p["fill"]
    layers = 30.0 * (parameters / 1e9) ** 0.1
    width = np.sqrt(parameters / (18.0 * layers))
    arithmetic = 4.0 * batch * parameters * tokens / (peak * p["arithmetic"])
    arithmetic = arithmetic + 8.0 * batch * tokens**2 * width * layers / (peak * p["attention"])
    launches = p["host"] + layers * p["launch"]
    message = 2.0 * 8.0 * batch * tokens * width / devices
    split = (heads - 1.0) / heads * p["heads"] + (ring - 1.0) * p["ring"]
    exchange = layers * (np.where(devices > 1, p["latency"], 0.0) * ring + message * split)
    step = (launches**4 + arithmetic**4) ** 0.25 + exchange
    return np.log(steps * step + p["fixed"] + batch * pixels * p["decode"])[:, None]
