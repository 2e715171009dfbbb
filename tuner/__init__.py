"""tuner: find the fastest safe configuration of a PyTorch training job, then run that job."""

__version__ = "0.1.0"
