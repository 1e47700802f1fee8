"""`objective`: what a network learns to predict, and how its error is weighed."""

from dataclasses import dataclass
from typing import Annotated, Literal

from ...errors import CascadeError, quoted
from ..ranges import Range, Share, check_ranges

Weighting = Literal[
    "p2", "adaptive", "debiased", "constant", "min_snr_gamma", "sech", "x0_snr", "x0_snr_plus_one", "x0_min_snr",
    "x0_min_snr_plus_one", "x0_truncated_snr", "x0_sigmoid",
]  # fmt: skip


@dataclass(frozen=True)
class ObjectiveSettings:
    """What the network learns to predict. The defaults are the published ones.

    diffusion     the noise, at uniform times, the error weighed by `weighting` of the log-SNR
    consistency   the end of its own guided path in one step, for few steps of the `lcm` sampler (LoRA alone)
    """

    # by the pictures' noise, or for few steps
    kind: Literal["diffusion", "consistency"] = "diffusion"
    weighting: Weighting | None = None  # null: p2; for consistency, which begins at pure noise, debiased
    snr_gamma: Annotated[float, Range(0, 1e6, above=True)] = 5.0  # of min_snr_gamma
    # upper bound of the weights
    max_loss_weight: Annotated[float | None, Range(0, 1e9, above=True)] = None
    pure_noise_share: Share = 0.0  # share of a batch that is trained at pure noise
    # of the schedule from which times are drawn; above 1 is more noise
    shift: Annotated[float, Range(0.001, 1000)] = 1.0
    # diffusion: bounds of the times that are drawn; 0 is the picture, 1 pure noise
    t_range: Annotated[tuple[float, ...], Range(0, 1)] = (0.0, 1.0)
    # strength of noise that is constant over each channel, so that brightness is learned too
    noise_offset: Share = 0.0
    multires_noise: Share = 0.0  # strength of noise at half the size; at a quarter its square, and so on
    # the error above which the loss is linear instead of quadratic; null: never
    huber: Annotated[float | None, Range(0, 1e6, above=True)] = None
    # consistency: the teacher's cfg; with two bounds, one is drawn for each picture
    guidance: Annotated[tuple[float, ...], Range(-1000, 1000)] = (4.0,)
    # consistency: of the guided path
    cfg_rescale: Share = 0.7
    # consistency: number of steps of the teacher's path
    solver_steps: Annotated[int, Range(2, 10_000)] = 50
    sampling_steps: int | None = None  # consistency: the only number of `lcm` steps to train for; null: any
    # consistency: share of a batch that starts from the student's own last step
    on_policy_share: Share = 0.0

    def __post_init__(self) -> None:
        check_ranges(self, "objective")
        if len(self.t_range) != 2 or not self.t_range[0] < self.t_range[1]:
            raise CascadeError(
                f"objective.t_range is {quoted(list(self.t_range))}; two times, the smaller first, are expected."
            )
        if self.pure_noise_share and self.t_range[1] < 1:
            raise CascadeError(
                f"objective.pure_noise_share is {self.pure_noise_share} at t = 1, but t_range ends at "
                f"{self.t_range[1]}; set one of them back."
            )
        if self.kind == "consistency" and (
            self.t_range != (0.0, 1.0) or self.noise_offset or self.multires_noise or self.huber is not None
        ):
            raise CascadeError(
                "objective.t_range, noise_offset, multires_noise and huber are of the kind diffusion; leave them out."
            )
        if len(self.guidance) not in (1, 2):
            raise CascadeError(
                f"objective.guidance is {quoted(list(self.guidance))}; one number or two bounds are expected."
            )
        steps = self.sampling_steps
        if steps is not None and not (1 <= steps <= self.solver_steps and self.solver_steps % steps == 0):
            raise CascadeError(
                f"objective.sampling_steps is {quoted(steps)}; solver_steps ({self.solver_steps}) must be a multiple "
                "of it."
            )

    @property
    def loss_weight(self) -> Weighting:
        return self.weighting or ("debiased" if self.kind == "consistency" else "p2")
