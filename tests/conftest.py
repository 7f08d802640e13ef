"""One thread for each process of the tests: tiny models are fastest so, and tests that run beside each other do not
wait for one another's threads. It is here because torch reads it when it is imported."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
