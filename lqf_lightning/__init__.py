"""Linearized and ordinary fine-tuning of vision models with PyTorch Lightning."""

from importlib.metadata import version

__version__ = version("lqf-lightning")
