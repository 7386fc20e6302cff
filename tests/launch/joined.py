"""A process of a job, with JAX: joins the others, and adds something up with them."""

import os

import jax
from jax.experimental import multihost_utils

number = os.environ.get("JAX_PROCESS_ID")
if number is None:
  # JAX finds all by itself.
  jax.distributed.initialize()
else:
  count = int(os.environ["JAX_NUM_PROCESSES"])
  jax.distributed.initialize(num_processes=count, process_id=int(number))

gathered = multihost_utils.process_allgather(jax.numpy.array(jax.process_index()))
print(
  f"process={jax.process_index()}/{jax.process_count()} devices={jax.device_count()} "
  f"sum={int(gathered.sum())}",
  flush=True,
)
jax.distributed.shutdown()
