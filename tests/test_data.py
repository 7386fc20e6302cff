"""Batches: order, crops, resumption, sharding, padding, worker processes."""

import itertools
import os
import signal
import subprocess
import sys
import textwrap
import time

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from test_data_images import encoded, photograph

from fidelity_jax import data
from fidelity_jax.data import batches as batching
from fidelity_jax.data import dataset as datasets
from fidelity_jax.data import patches
from fidelity_jax.errors import RunError, UsageError

OPTIONS = {
  "image_size": 8,
  "batch_size": 5,
  "seed": 0,
  "purpose": "classifier",
  "epochs": 2,
}


def make(count=23, size=12, classes=3):
  """Returns a dataset of `count` small images in memory."""
  pictures = [photograph(size, size + i % 5, seed=i) for i in range(count)]
  return data.Dataset(
    name="toy",
    split="train",
    records=datasets.MemoryRecords(tuple(encoded(p) for p in pictures)),
    keys=tuple(f"toy/{i}" for i in range(count)),
    labels=np.arange(count, dtype=np.int32) % classes,
    class_names=tuple("abc"[:classes]),
  )


def train(dataset, **kwargs):
  """Returns a list of training batches."""
  with data.train_iterator(dataset, **(OPTIONS | kwargs)) as batches:
    return list(batches)


def assert_same(actual, expected):
  """Asserts that two lists of batches are equal."""
  assert len(actual) == len(expected)
  for a, b in zip(actual, expected, strict=True):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_array_equal(a[name], b[name])


def test_an_epoch_is_whole_batches_of_a_new_permutation():
  dataset = make()
  batches = train(dataset, epochs=3)
  assert len(batches) == 3 * 4
  orders = []
  for epoch in range(3):
    part = batches[4 * epoch : 4 * epoch + 4]
    order = np.concatenate([batch["index"] for batch in part])
    assert len(set(order.tolist())) == 20
    assert all((batch["epoch"] == epoch).all() for batch in part)
    orders.append(order)
  left_out = [set(range(23)) - set(order.tolist()) for order in orders]
  assert left_out[0] != left_out[1] and (orders[0] != orders[1]).any()
  for batch in batches:
    assert batch["image"].shape == (5, 8, 8, 3) and batch["image"].dtype == np.uint8
    assert batch["index"].dtype == batch["epoch"].dtype == np.int32
    assert batch["label"].dtype == np.int32
    np.testing.assert_array_equal(batch["label"], dataset.labels[batch["index"]])


def by_place(batches):
  """Returns the pixels by (epoch, example)."""
  return {
    (int(e), int(i)): image
    for batch in batches
    for e, i, image in zip(batch["epoch"], batch["index"], batch["image"], strict=True)
  }


def test_crops_depend_on_seed_purpose_epoch_and_example_alone():
  dataset = make()
  fives, sevens = by_place(train(dataset)), by_place(train(dataset, batch_size=7))
  both = fives.keys() & sevens.keys()
  assert len(both) > 30
  for place in both:
    np.testing.assert_array_equal(fives[place], sevens[place])
  other_seed = by_place(train(dataset, seed=1))
  assert any((fives[p] != other_seed[p]).any() for p in fives.keys() & other_seed)
  assert any((fives[0, i] != fives[1, i]).any() for i in range(23) if (0, i) in fives)


def test_purposes_have_orders_and_crops_of_their_own():
  dataset = make()
  one, other = train(dataset), train(dataset, purpose="calibration")
  orders = [np.concatenate([b["index"] for b in batches]) for batches in (one, other)]
  assert (orders[0] != orders[1]).any()
  one, other = by_place(one), by_place(other)
  both = one.keys() & other.keys()
  assert len(both) > 30
  differ = sum((one[place] != other[place]).any() for place in both)
  assert differ > 0.9 * len(both)


def test_orders_and_crops_stay_what_they_are():
  """Other draws would make other results of the same config."""
  assert batching.permutation(0, "classifier", 1, 6).tolist() == [1, 2, 3, 0, 5, 4]
  assert batching.generator(3, "classifier/crop", 1, 5).integers(1000) == 729


@pytest.mark.parametrize("start", [1, 4, 6, 8])
def test_a_later_start_goes_on_exactly(start):
  dataset = make()
  assert_same(train(dataset, start_step=start), train(dataset)[start:])


def test_a_late_start_decodes_nothing_before():
  begin = time.perf_counter()
  late = train(make(), epochs=100_000, start_step=4 * 100_000 - 1)
  assert len(late) == 1 and time.perf_counter() - begin < 5


@pytest.mark.parametrize("count", [2, 5])
def test_shards_make_up_the_global_batch(count):
  dataset = make()
  whole = train(dataset, batch_size=10)
  shards = [
    train(dataset, batch_size=10, shard_index=i, shard_count=count)
    for i in range(count)
  ]
  joined = [
    {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    for parts in zip(*shards, strict=True)
  ]
  assert_same(joined, whole)


@pytest.mark.parametrize(
  "batch_size, shards",
  # A batch is shared evenly.
  [(n, k) for n in (1, 4, 8, 23, 24, 64) for k in (1, 2) if n % k == 0],
)
def test_evaluation_counts_every_example_once(batch_size, shards):
  dataset = make()
  parts = [
    list(
      data.eval_iterator(
        dataset,
        image_size=8,
        batch_size=batch_size,
        shard_index=i,
        shard_count=shards,
      )
    )
    for i in range(shards)
  ]
  assert {len(part) for part in parts} == {-(-23 // batch_size)}
  counted = np.zeros(23)
  for batch in itertools.chain.from_iterable(parts):
    assert batch["image"].shape == (batch_size // shards, 8, 8, 3)
    assert batch["mask"].dtype == np.float32
    np.add.at(counted, batch["index"], batch["mask"])
    real = batch["mask"] > 0
    np.testing.assert_array_equal(
      batch["label"][real], dataset.labels[batch["index"][real]]
    )
    assert not batch["image"][~real].any()
  np.testing.assert_array_equal(counted, 1)


DEVICES = textwrap.dedent(
  """
  import sys
  sys.path.insert(0, {tests!r})
  import jax
  import numpy as np
  import test_data
  from jax.sharding import Mesh
  from fidelity_jax import data, sharding

  count = jax.jit(lambda index, mask: jax.numpy.zeros(23).at[index].add(mask))
  dataset = test_data.make()
  assert len(jax.devices()) == 8
  for devices in (1, 2, 3, 5, 8):
    grid = np.asarray(jax.devices()[:devices]).reshape(-1, 1)
    layout = sharding.Layout(Mesh(grid, ("data", "model")))
    for size in (1, 4, 7, 23, 40):
      batches = data.eval_iterator(
        dataset, image_size=4, batch_size=sharding.round_up(layout, size)
      )
      counted = np.zeros(23)
      for batch in data.prefetch_to_device(batches, layout.batch):
        assert len(batch["image"].sharding.device_set) == devices
        counted += np.asarray(count(batch["index"], batch["mask"]))
      np.testing.assert_array_equal(counted, 1, err_msg=f"{{devices}} {{size}}")
  print("each once")
  """
)


def test_evaluation_counts_every_example_once_on_any_device_count(tmp_path):
  script = tmp_path / "devices.py"
  script.write_text(DEVICES.format(tests=os.path.dirname(__file__)))
  flags = "--xla_force_host_platform_device_count=8"
  result = subprocess.run(
    [sys.executable, script],
    env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
  )
  assert result.stdout == "each once\n", result.stderr


@pytest.mark.parametrize("shards", [2, 3, 4])
def test_hosts_share_an_epoch_without_overlap_or_loss(shards):
  dataset = make(count=25)
  seen = [
    index
    for i in range(shards)
    for batch in train(
      dataset, batch_size=12, epochs=1, shard_index=i, shard_count=shards
    )
    for index in batch["index"].tolist()
  ]
  whole = [
    i for batch in train(dataset, batch_size=12, epochs=1) for i in batch["index"]
  ]
  assert len(seen) == len(set(seen)) == 24 and set(seen) == set(whole)


def test_a_run_goes_on_mid_epoch_with_other_workers():
  dataset = make()
  expected = train(dataset)
  with data.train_iterator(dataset, **OPTIONS) as batches:
    first = [next(batches) for _ in range(3)]
  assert_same(first + train(dataset, start_step=3, num_workers=1), expected)


def test_worker_processes_change_nothing():
  dataset = make()
  assert_same(train(dataset, num_workers=2), train(dataset))
  options = {"image_size": 8, "batch_size": 9}
  with data.eval_iterator(dataset, num_workers=1, **options) as batches:
    assert_same(list(batches), list(data.eval_iterator(dataset, **options)))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_record_that_breaks_during_the_run_is_named(num_workers):
  dataset = make()
  encoded_images = list(dataset.records.encoded)
  encoded_images[7] = encoded_images[7][:40]
  dataset = data.Dataset(
    **{
      **{f: getattr(dataset, f) for f in ("name", "split", "keys", "labels")},
      "class_names": dataset.class_names,
      "records": datasets.MemoryRecords(tuple(encoded_images)),
    }
  )
  with pytest.raises(RunError, match=r"^toy/7: .*usable when the run began"):
    train(dataset, num_workers=num_workers)


def test_the_classes_are_those_that_the_classifier_knows():
  names = make().class_names
  data.check_classes(make(), names)
  for known in (names[:2], [*names[:2], "another"]):
    with pytest.raises(UsageError, match=r"has 3 classes .*, but the classifier was"):
      data.check_classes(make(), known)


def test_prefetch_keeps_order_and_sharding():
  devices = np.array(jax.devices())
  sharding = NamedSharding(Mesh(devices, "data"), PartitionSpec("data"))
  host = train(make(), batch_size=8)
  placed = list(data.prefetch_to_device(iter(host), sharding))
  assert all(batch["image"].sharding == sharding for batch in placed)
  assert_same([jax.device_get(batch) for batch in placed], host)


def test_prefetch_runs_ahead():
  taken = []

  def source():
    for i in range(5):
      taken.append(i)
      yield {"x": np.zeros(2)}

  batches = data.prefetch_to_device(source())
  next(batches)
  assert taken == [0, 1]
  host = data.train_iterator(make(), **OPTIONS)
  batches = data.prefetch_to_device(host)
  next(batches)
  batches.close()
  assert host._batches is None


def test_patches_of_the_paper():
  assert patches.starts(224, 50, 25) == (0, 25, 50, 75, 100, 125, 150, 174)
  assert patches.starts(64, 50, 25) == (0, 14)
  assert patches.starts(50, 50, 25) == (0,)
  images = np.arange(2 * 64 * 70 * 3, dtype=np.float32).reshape(2, 64, 70, 3)
  cut = np.asarray(jax.jit(lambda x: patches.extract_patches(x, 50, 25))(images))
  assert cut.shape == (2 * 4, 50, 50, 3)
  np.testing.assert_array_equal(cut[0], images[0, :50, :50])
  np.testing.assert_array_equal(cut[1], images[0, :50, 20:70])
  np.testing.assert_array_equal(cut[6], images[1, 14:64, :50])


def test_draws_are_addressed():
  first = batching.generator(0, "crop", epoch=1, index=5).uniform()
  assert first == batching.generator(0, "crop", epoch=1, index=5).uniform()
  others = [(1, "crop", 1, 5), (0, "order", 1, 5), (0, "crop", 2, 5), (0, "crop", 1, 6)]
  assert len({first, *(batching.generator(*o).uniform() for o in others)}) == 5


RUNNER = textwrap.dedent(
  """
  import sys, time
  sys.path.insert(0, {tests!r})
  import test_data
  from fidelity_jax import data

  if __name__ == "__main__":
    options = test_data.OPTIONS | dict(epochs=10**6, num_workers=2)
    batches = data.train_iterator(test_data.make(), **options)
    next(batches)
    print("started", flush=True)
    for number, batch in enumerate(batches):
      time.sleep(0.01)
      if sys.argv[1] == "0" and number == 50:
        raise SystemExit(3)
  """
)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, 0])
def test_workers_end_with_their_parent(tmp_path, how):
  script = tmp_path / "runner.py"
  script.write_text(RUNNER.format(tests=os.path.dirname(__file__)))
  command = [sys.executable, script, str(int(how))]
  run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
  try:
    assert run.stdout.readline() == "started\n"
    workers = children(run.pid)
    assert len(workers) >= 2
  finally:
    run.send_signal(how)
    assert run.wait(30) == (-how or 3)
  deadline = time.monotonic() + 20
  while any(alive(worker) for worker in workers) and time.monotonic() < deadline:
    time.sleep(0.1)
  assert not [worker for worker in workers if alive(worker)]


def children(parent):
  """Returns the process ids of a process's children."""
  found = []
  for name in filter(str.isdigit, os.listdir("/proc")):
    try:
      with open(f"/proc/{name}/stat") as file:
        fields = file.read().rsplit(")", 1)[1].split()
    except OSError:
      continue
    if int(fields[1]) == parent:
      found.append(int(name))
  return found


def alive(pid):
  """Returns whether a process runs."""
  try:
    with open(f"/proc/{pid}/stat") as file:
      return file.read().rsplit(")", 1)[1].split()[0] != "Z"
  except OSError:
    return False
