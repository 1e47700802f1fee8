"""Training: objectives, weight averaging, and a loop that resumes where it was killed."""
