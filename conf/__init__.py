"""Configuration groups; an importable package, because Hydra looks configurations up as one."""
