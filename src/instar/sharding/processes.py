"""Several processes as one program."""

import os

import jax

from instar.errors import UserError

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def join_processes() -> None:
    """Joins the processes named by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Does nothing where none of them is set. Must run before the first use of a device.

    Raises:
      UserError: only some of them are set, or one is not a number.
    """
    values = {name: os.environ.get(name) for name in VARIABLES}
    missing = [name for name, value in values.items() if value is None]
    if len(missing) == len(VARIABLES):
        return
    if missing:
        raise UserError(f"{' and '.join(missing)} must be set too, or none of {VARIABLES}")
    address, *numbers = values.values()
    if not all(number.isdigit() for number in numbers):
        raise UserError(f"JAX_NUM_PROCESSES and JAX_PROCESS_ID must be numbers, not {numbers}")
    jax.distributed.initialize(address, int(numbers[0]), int(numbers[1]))
