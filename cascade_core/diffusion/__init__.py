"""The mathematics of sampling: the schedule, samplers, guidance and noise."""
