"""Typed configuration: one frozen dataclass for each Hydra group under configs/."""
