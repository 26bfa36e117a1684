"""Every error that abyssal raises on purpose.

    AbyssalError
    ├── InputError          bad input from a user; the command line exits with 2
    │   ├── ConfigError     a config.json or ModelConfig that we refuse
    │   ├── CheckpointError a checkpoint folder, shard or tensor that is wrong
    │   ├── TokenError      token ids or text out of range
    │   ├── DataError       training data that is missing, damaged or made for something else
    │   └── ContextError    a prompt longer than context or memory can hold
    └── RunError            the work itself failed; the command line exits with 1
        ├── SaveError       writing failed; the destination is unchanged
        └── CapacityError   pages or slots of a bounded memory are used up; smaller work goes on
"""

from __future__ import annotations


class AbyssalError(Exception):
    """Base of all; its text is one sentence that names the value and the remedy."""


class InputError(AbyssalError):
    """Bad input from a user."""


class ConfigError(InputError):
    """A config.json or ModelConfig that we refuse."""


class CheckpointError(InputError):
    """A checkpoint folder, shard or tensor that is wrong."""


class TokenError(InputError):
    """Token ids or text out of range."""


class DataError(InputError):
    """Training data that is missing, damaged or made for something else."""


class ContextError(InputError):
    """A prompt longer than the context, or than the memory can ever hold."""


class RunError(AbyssalError):
    """The work itself failed."""


class SaveError(RunError):
    """Writing failed; the destination is unchanged."""


class CapacityError(RunError):
    """Pages or slots of a bounded memory are used up; smaller work goes on."""
