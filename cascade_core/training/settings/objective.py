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

    diffusion     predicts the noise at uniform times; `weighting` weighs the error by the log-SNR
    consistency   predicts in one step where many guided steps lead, for few steps of the `lcm` sampler (only a LoRA)
    """

    kind: Literal["diffusion", "consistency"] = "diffusion"  # see above
    # weight of the error at each noise level; null: p2 for diffusion, debiased for consistency, which starts at
    # pure noise
    weighting: Weighting | None = None
    snr_gamma: Annotated[float, Range(0, 1e6, above=True)] = 5.0  # the γ of the weighting min_snr_gamma
    max_loss_weight: Annotated[float | None, Range(0, 1e9, above=True)] = None  # upper bound of the weights
    pure_noise_share: Share = 0.0  # share of a batch that is trained at pure noise
    # shift of the schedule from which the times are drawn; above 1 gives more noise
    shift: Annotated[float, Range(0.001, 1000)] = 1.0
    # diffusion: bounds of the times that are drawn; 0 is the picture, 1 pure noise
    t_range: Annotated[tuple[float, ...], Range(0, 1)] = (0.0, 1.0)
    # strength of extra noise that is constant over each channel, so that brightness is learned too
    noise_offset: Share = 0.0
    # strength of extra noise at half the size. At a quarter of the size its square is used, and so on
    multires_noise: Share = 0.0
    # the error above which the loss grows linearly instead of quadratically; null: never
    huber: Annotated[float | None, Range(0, 1e6, above=True)] = None
    # consistency: the cfg that the LoRA learns; with two bounds, one value is drawn for each picture
    guidance: Annotated[tuple[float, ...], Range(-1000, 1000)] = (4.0,)
    cfg_rescale: Share = 0.7  # consistency: the cfg_rescale that the LoRA learns
    # consistency: number of steps of the path that the LoRA learns to shorten
    solver_steps: Annotated[int, Range(2, 10_000)] = 50
    # consistency: trains for this number of `lcm` steps only; null: any number
    sampling_steps: int | None = None
    on_policy_share: Share = 0.0  # consistency: share of a batch that starts from the LoRA's own last step

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
