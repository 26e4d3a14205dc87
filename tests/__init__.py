"""What surrounds every process of a test run: four simulated CPU devices, no network, compiled programs that it shares.

It is set before JAX is imported, and inherited by the workers and by processes that tests start.
"""

import gc
import os
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
gc.set_threshold(200_000, 20, 100)  # traces are millions of objects that live on; looking for garbage takes a sixth
OWNER = "SDJAX_TESTS_OWNER"
if OWNER not in os.environ:  # the run's first process
    os.environ[OWNER] = str(os.getpid())
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="sdjax-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"
